"""Run a share of the corpus in a process of its own, and print a line of JSON for each thing that happens.

    python tools/corpus/worker.py <OPTIONS

OPTIONS is a file of a JSON object: `steps`, `variants`, `only`, `part`, `numeric`, `share` ([index, number of
workers]), `folder`, where models are written, `done`, the cases and variants that an earlier process finished, and
`skip`, the steps that made one hang or die. `{"at": [case, variant, step]}` says what begins, and `{"done": [case,
variant], "outcomes": {step: [kind, detail]}}` what became of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cases import Case, chosen
from outcomes import ORIGINAL, SAVE, Memory, Subject
from sources import all_cases
from variants import VARIANTS

Report = Callable[[Mapping[str, Any]], None]


def run_share(options: Mapping[str, Any], cases: Sequence[Case], report: Report) -> None:
    """Run all steps over the variants of a share of the cases."""
    index, number = options["share"]
    done = {tuple(item) for item in options["done"]}
    skipped = {tuple(item) for item in options["skip"]}
    for case in chosen(cases, options["only"], options["part"])[index::number]:
        memory: Memory = {}
        for variant in options["variants"]:
            if (case.name, variant) not in done and (not case.variants or variant in case.variants):
                _run_variant(case, variant, options, skipped, memory, report)


def _run_variant(
    case: Case, variant: str, options: Mapping[str, Any], skipped: set[Any], memory: Memory, report: Report
) -> None:
    written = VARIANTS[variant](case)
    if written is None:
        return
    # onnxruntime ends the process on some models and lengths before any pass is run; those lengths are left out then.
    if (case.name, variant, ORIGINAL) in skipped:
        written = dataclasses.replace(written, feeds=written.feeds[:1])
    report({"at": [case.name, variant, ORIGINAL]})
    outcomes = {}
    with tempfile.TemporaryDirectory(dir=options["folder"]) as folder:
        subject = Subject(case, written, Path(folder), memory, numeric=options.get("numeric", False))
        subject.run_original()
        if SAVE in options["steps"]:
            report({"at": [case.name, variant, SAVE]})
        for step, take in subject.steps(options["steps"]):
            if (case.name, variant, step) in skipped:
                continue
            report({"at": [case.name, variant, step]})
            outcome = take()
            outcomes[step] = [outcome.kind, outcome.detail]
    report({"done": [case.name, variant], "outcomes": outcomes})


def main(text: str) -> None:
    """Run the share that the options name; whatever libraries print goes to stderr."""
    warnings.simplefilter("ignore")
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def report(item: Mapping[str, Any]) -> None:
        print(json.dumps(item), file=lines, flush=True)

    options = json.loads(text)
    report({"at": ["(start)", "", ""]})
    run_share(options, all_cases(), report)


if __name__ == "__main__":
    main(sys.stdin.read())
