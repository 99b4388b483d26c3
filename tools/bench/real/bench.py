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

from process_usage import Usage, watched
from real.inputs import find_model
from real.report import Measured, Step, page

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "tools" / "bench" / "real" / "candidates.py"
PAGE = ROOT / "docs" / "measured" / "real.md"
EXPORT = "export"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A pipeline over the exported model, and what its result must hold; the bars are reasoned for on the page.

    Attributes:
        passes: The pipeline.
        compiled: Compile the result too, and generate with it.
        kl: The largest mean KL divergence from transformers, in nats.
        perplexity: The largest perplexity over that of transformers.
    """

    passes: str
    compiled: bool = True
    kl: float = 1e-6
    perplexity: float = 1.0001

    @property
    def exact(self) -> bool:
        """Return whether the passes change rounding only, so that greedy tokens must be equal."""
        return self.kl <= 1e-6


VARIANTS = {
    "fused": Variant("fuse"),
    "3 ranks": Variant("fuse,tp{degree=3}"),
    "int8 weights": Variant("fuse,int8", kl=0.01, perplexity=1.01),
    "int8 weights and head": Variant("fuse,int8{head=true}", compiled=False, kl=0.01, perplexity=1.01),
    "int8 weights and activations": Variant("fuse,int8{activations=dynamic}", kl=0.1, perplexity=1.05),
}


class Measurement:
    """The measurement in a scratch folder; `steps` holds every command with its usage, `failures` what must not be."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self.steps: list[Step] = []
        self.rows: list[Measured] = []
        self.failures: list[str] = []

    def run(self, gguf: Path) -> None:
        """Run everything; the first failure of a command ends it."""
        reference = self._candidate("transformers", gguf, "transformers, from the GGUF file", gguf.stat().st_size)
        self._passopt(EXPORT, str(gguf), "-o", "export", "--dtype", "fp32")
        self._measure("export", "onnx", "export")
        for index, (name, variant) in enumerate(VARIANTS.items()):
            folder = f"model{index}"
            self._passopt("run", "export", "--passes", variant.passes, "-o", folder)
            self._measure(name, "onnx", folder)
            self._verify(name, folder, variant)
            if variant.compiled:
                self._passopt("compile", folder, "-o", f"{folder}.lib")
                self._measure(name, "compiled", f"{folder}.lib")
                shutil.rmtree(self._scratch / f"{folder}.lib")
            shutil.rmtree(self._scratch / folder)
        self._judge(reference)

    def _passopt(self, *arguments: str, allowed_to_fail: bool = False) -> Usage:
        shown = "passopt " + " ".join(f"'{item}'" if "{" in item else item for item in arguments)
        print(f"$ {shown}", flush=True)
        usage = watched(self._scratch, [sys.executable, "-m", "passopt", *arguments])
        if usage.failure and not allowed_to_fail:
            raise SystemExit(f"real: {shown} {usage.failure}")
        output = arguments[arguments.index("-o") + 1] if "-o" in arguments else None
        self.steps.append(Step(shown.replace(str(ROOT), "."), usage, 0 if output is None else self._size(output)))
        return usage

    def _verify(self, name: str, folder: str, variant: Variant) -> None:
        usage = self._passopt("verify", "export", folder, allowed_to_fail=True)
        if usage.failure and variant.exact:
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

    def _judge(self, reference: Measured) -> None:
        for row in self.rows[1:]:
            bar = VARIANTS.get(row.name, Variant(""))
            where = f"{row.name}, {row.engine}"
            ratio = row.found["perplexity"] / reference.found["perplexity"]
            if not row.found["kl"] <= bar.kl:
                self.failures.append(f"{where}: mean KL divergence {row.found['kl']:.2e}, at most {bar.kl:.0e} allowed")
            if not ratio <= bar.perplexity:
                self.failures.append(f"{where}: perplexity × {ratio:.4f}, at most {bar.perplexity} allowed")
            if bar.exact and row.found.get("equal") != row.found.get("prompts"):
                equal, count = row.found["equal"], row.found["prompts"]
                self.failures.append(f"{where}: greedy tokens of {equal} of {count} prompts are those of transformers")


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
