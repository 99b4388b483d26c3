"""Quantise a trained model in every way, measure what each costs, and write the page and the picture.

    python tools/bench quality [GGUF] [--output docs/measured/quantisation.md] [--only NAME …]

Without a file, the model comes from a package on PyPI. It takes about an hour on two cores, and fails if a way is
worse against another one than it must be. Texts that are measured are not among those of the calibration.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from process_usage import Usage, watched
from quality.inputs import texts
from quality.report import Row, page, picture
from quality.variants import CALIBRATIONS, GOALS, VARIANTS, Variant
from real.inputs import find_model

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "measured" / "quantisation.md"
PICTURE = PAGE.with_suffix(".svg")
#: The tokens of each text that are measured, in windows of this length, and those of the calibration.
TOKENS, WINDOW = 9 * 1024, 1024
SAMPLES, LENGTH = 24, 512


class Measurement:
    """The measurement in a scratch folder."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._made: set[str] = set()
        self._texts, calibration = texts()
        for index, text in enumerate(self._texts.values()):
            (scratch / f"text{index}.txt").write_text(text, encoding="utf-8")
        (scratch / "calibration.txt").write_text(calibration, encoding="utf-8")
        self.rows: list[Row] = []
        self.calibrations: dict[str, Usage] = {}

    def run(self, gguf: Path, variants: Sequence[Variant]) -> None:
        """Run everything; the first failure of a command ends it."""
        self._passopt("export", str(gguf), "-o", "export", "--dtype", "fp32")
        self._passopt("run", "export", "--passes", "fuse", "-o", "fused")
        self.rows.append(Row("fp32", "", self._evaluated("fused"), Usage()))
        for variant in variants:
            for name in _named(variant.passes):
                self._calibrate(name)
            usage = self._passopt("run", "fused", "--passes", self._with_folders(variant.passes), "-o", "made")
            found = self._evaluated("made", "--reference", "fused", "--cache", "kept")
            self.rows.append(Row(variant.name, variant.passes, found, usage, variant.cache))
            shutil.rmtree(self._scratch / "made")

    def judge(self) -> list[str]:
        """Return what is worse than it must be, in plain sentences."""
        kls = {row.name: [text["kl_mean"]["value"] for text in row.found["texts"]] for row in self.rows[1:]}
        failures = []
        for goal in GOALS:
            for index, text in enumerate(self._texts if goal.variant in kls else ()):
                value = kls[goal.variant][index]
                most = goal.most * (kls[goal.than][index] if goal.than in kls else 1.0)
                if not value <= most and (not goal.than or goal.than in kls):
                    failures.append(f"{goal.variant}, {text}: KL {value:.2g}, at most {most:.2g} allowed")
        return failures

    def _calibrate(self, name: str) -> None:
        """Calibrate once, after the calibrations that the passes before need."""
        if name in self._made:
            return
        wanted = CALIBRATIONS[name]
        for before in _named(wanted.passes):
            self._calibrate(before)
        passes = ["--passes", self._with_folders(wanted.passes)] if wanted.passes else []
        data = ["--data", "text:calibration.txt", "--nsamples", str(SAMPLES), "--seqlen", str(LENGTH)]
        self.calibrations[name] = self._passopt("calibrate", "fused", *passes, *data, *wanted.options, "-o", name)
        self._made.add(name)

    def _with_folders(self, passes: str) -> str:
        """Return a pipeline with absolute paths, since a relative one would be one of the model's folder."""
        return re.sub(r"from=(\w+)", lambda found: f"from={self._scratch / found[1]}", passes)

    def _evaluated(self, folder: str, *more: str) -> dict[str, Any]:
        given = [item for index in range(len(self._texts)) for item in ("--text", f"text{index}.txt")]
        size = ["--window", str(WINDOW), "--max-tokens", str(TOKENS)]
        usage = self._passopt("eval", folder, *given, *size, *more, "--json")
        models: Sequence[Mapping[str, Any]] = json.loads(usage.output)["models"]
        found = dict(models[-1])
        print("   ", [text.get("kl_mean") for text in found["texts"]], flush=True)
        return found

    def _passopt(self, *arguments: str) -> Usage:
        shown = "passopt " + " ".join(f"'{item}'" if "{" in item else item for item in arguments)
        print(f"$ {shown}", flush=True)
        usage = watched(self._scratch, [sys.executable, "-m", "passopt", *arguments])
        if usage.failure:
            raise SystemExit(f"quality: {shown} {usage.failure}")
        return usage


def _named(passes: str) -> list[str]:
    """Return the calibrations that a pipeline names."""
    return re.findall(r"from=(\w+)", passes)


def main(arguments: Sequence[str]) -> None:
    """Measure, write page and picture, and exit with 1 if a way of quantising is worse than it must be."""
    parser = argparse.ArgumentParser(
        "python tools/bench quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf", nargs="?", type=Path, help="GGUF file of the model (default: from PyPI)")
    parser.add_argument("--output", type=Path, default=PAGE, help="page to write, and the picture beside it")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="measure these ways only")
    options = parser.parse_args(arguments)
    known = [variant.name for variant in VARIANTS]
    if unknown := [name for name in options.only if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; known are: {'; '.join(known)}")
    gguf = (options.gguf or find_model(ROOT / "build" / "real")).absolute()
    with tempfile.TemporaryDirectory(prefix="passopt-quality-") as scratch:
        measurement = Measurement(Path(scratch))
        measurement.run(gguf, [item for item in VARIANTS if not options.only or item.name in options.only])
        failures = measurement.judge()
    options.output.write_text(page(measurement.rows, measurement.calibrations, SAMPLES * LENGTH), encoding="utf-8")
    options.output.with_suffix(".svg").write_text(picture(measurement.rows), encoding="utf-8")
    print(f"→ {options.output}")
    if failures:
        raise SystemExit("quality: " + "\nquality: ".join(failures))
