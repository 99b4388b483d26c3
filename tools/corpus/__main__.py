"""Run every pass over models that nobody here wrote, and count what becomes of them.

    python tools/corpus [--passes a,b;c] [--variants V,…] [--only GLOB] [--part N/M] [--json] [--write FILE]

`--passes` names steps, separated by semicolons: each is a pipeline text that runs by itself. Without it, every pass
runs with its default options, and the pipelines that `outcomes` lists. Any defect makes the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from outcomes import FAULTS, PIPELINES, SAVE, TEXT
from passopt.ir.errors import UsageError
from passopt.passes.framework.catalog import catalog
from passopt.passes.pipeline.text import resolve
from table import faults, page, table
from variants import VARIANTS
from wheels import absent_packages
from workers import Row, run_all


def main(arguments: Sequence[str]) -> int:
    """Run the corpus as the arguments say, print the table, and return 1 if there is any defect."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        for step in steps(options.passes):
            if step not in {SAVE, TEXT}:
                resolve(step)
    except UsageError as error:
        parser.error(str(error))
    settings = {
        "steps": steps(options.passes),
        "variants": options.variants.split(",") if options.variants else list(VARIANTS),
        "only": options.only,
        "part": options.part,
        "numeric": options.numeric,
    }
    if absent := absent_packages():
        print(f"not had: the files of {', '.join(absent)}; install them without dependencies", file=sys.stderr)
    rows: list[Row] = []
    start = time.monotonic()
    for row in run_all(settings, options.workers):
        rows.append(row)
        if sys.stderr.isatty() and len(rows) % 500 == 0:
            print(f"\r\033[K{len(rows)} outcomes, {row[0]}", end="", file=sys.stderr, flush=True)
    order = {name: place for place, name in enumerate(settings["steps"])}
    rows.sort(key=lambda row: (order.get(row[2], -1), row[0], row[1]))
    print(json.dumps(rows) if options.json else _report(rows, options.refusals), end="")
    print(f"{len(rows)} outcomes in {time.monotonic() - start:.0f} s", file=sys.stderr)
    if options.write:
        Path(options.write).write_text(page(rows, options.part, absent), encoding="utf-8")
    return 1 if any(row[3] in FAULTS for row in rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python tools/corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passes", default="", metavar="STEPS", help="run these steps only, separated by ';'")
    parser.add_argument("--variants", default="", metavar="V,…", help=f"write models these ways: {', '.join(VARIANTS)}")
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="take cases of these names")
    parser.add_argument("--part", default="", metavar="N/M", help="take the part N of M of a shuffled list")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="run as many processes")
    parser.add_argument("--numeric", action="store_true", help="run every pass under --verify-each=numeric as well")
    parser.add_argument("--refusals", action="store_true", help="list the reasons of refusals too")
    parser.add_argument("--json", action="store_true", help="print all outcomes as JSON")
    parser.add_argument("--write", metavar="FILE", help="write the page with the table to FILE")
    return parser


def steps(text: str) -> list[str]:
    """Return the steps that a text names, or all: saving, the text, every pass and the pipelines."""
    if text:
        return [step.strip() for step in text.split(";")]
    return [SAVE, TEXT, *catalog(), *PIPELINES]


def _report(rows: Sequence[Row], refusals: bool) -> str:
    kinds = (*FAULTS, "not read", "refused") if refusals else (*FAULTS, "not read")
    listed = faults(rows, kinds)
    return table(rows) + (f"\n{listed}" if listed else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
