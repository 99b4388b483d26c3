"""Run the main job from end to end on two tiny trained checkpoints: export, transform, verify, compile, generate.

    python tools/demo.py [DIR]

DIR keeps the files; without it, they go to a temporary folder that is removed. Two pipelines run: `tp,int8` on the
graph as it is exported, and `baichuan2,tp,int8`, which fuses it first. Both results are verified against the exported
graph. So are the compiled models, a single library and two ranks, before they generate text. A table sums it up.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

import passopt
from passopt.testing import ALIBI, ROTARY, CheckpointSpec, make_checkpoint
from passopt.testing.checkpoints import evaluation_text

FAMILIES = {"rotary": ROTARY, "alibi": ALIBI}
PIPELINES = ("tp,int8", "baichuan2,tp,int8")
MAX_TOKENS = 4000
PROMPT = "The expression list"


class Shown(passopt.Reporter):
    """Print what an operation says while it runs."""

    def say(self, message: str) -> None:
        print(f"    {message}", flush=True)


def show(call: str, result: object) -> None:
    """Print a call as a user would write it, and its result as the command of the same name prints it."""
    print(f">>> {call}")
    print("\n".join(f"    {line}" for line in str(result).splitlines()), flush=True)


def check(report: passopt.VerifyReport, call: str) -> passopt.VerifyReport:
    """Show a verification and return it; raise SystemExit if anything is beyond its tolerance."""
    show(call, report)
    if not report.ok:
        raise SystemExit(f"demo: {call} is beyond its tolerance")
    return report


def run_family(root: Path, name: str, spec: CheckpointSpec) -> tuple[list[list[str]], str]:
    """Export, transform and verify one family; return its rows of the table, and the text of its compiled model."""
    print(f"\n== {name}: {spec.layers} layers, {spec.heads} heads, hidden {spec.hidden}, vocabulary {spec.vocab}")
    checkpoint = make_checkpoint(root / f"checkpoint-{name}", spec, format="bin", shards=2)
    (root / "text.txt").write_text(evaluation_text(), encoding="utf-8")
    exported = passopt.export(checkpoint, root / name, dtype="fp32", trust_remote_code=True, reporter=Shown())
    show(f"passopt.export('{checkpoint.name}', '{name}', dtype='fp32', trust_remote_code=True)", exported)
    rows = [run_pipeline(root / name, name, pipeline, root / "text.txt") for pipeline in PIPELINES]
    return rows, run_compiled(root / name, root / "text.txt")


def run_pipeline(folder: Path, name: str, pipeline: str, text: Path) -> list[str]:
    """Run one pipeline, verify its result, and return its row of the table."""
    output = folder / ("model." + pipeline.replace(",", ".").replace("tp", "tp2"))
    result = passopt.run(folder, pipeline, output)
    show(f"passopt.run('{name}', '{pipeline}', '{output.name}')", result)
    report = passopt.verify(folder, output, text=text, max_tokens=MAX_TOKENS)
    check(report, f"passopt.verify('{name}', '{output.name}', text='{text.name}', max_tokens={MAX_TOKENS})")
    counts = {record.name: record.result.notes for record in result.records}
    sizes = [folder / "weights.safetensors", *output.glob("rank*/weights.safetensors")]
    before, *after = (file.stat().st_size for file in sizes)
    collectives = counts["shard"][0].partition("sharded, ")[2]
    return [name, pipeline, f"{before:,}", f"{sum(after):,}", collectives, *_figures(report)]


def run_compiled(folder: Path, text: Path) -> str:
    """Compile the fused int8 model and its ranks, verify both, generate text, and return that of the first."""
    name = folder.name
    compiled = passopt.compile(folder, folder / "compiled", passes="baichuan2,int8")
    show(f"passopt.compile('{name}', 'compiled', passes='baichuan2,int8')", compiled)
    ranks = passopt.compile(folder / "model.baichuan2.tp2.int8", folder / "compiled.tp2")
    show("passopt.compile('model.baichuan2.tp2.int8', 'compiled.tp2')", ranks)
    report = passopt.verify(folder, compiled.output, text=text, max_tokens=MAX_TOKENS)
    check(report, f"passopt.verify('{name}', 'compiled', text='{text.name}', max_tokens={MAX_TOKENS})")
    check(passopt.verify(folder, ranks.output), f"passopt.verify('{name}', 'compiled.tp2')")
    texts = []
    for output in (compiled.output, ranks.output):
        with passopt.Engine.load(output) as engine:
            found = engine.generate(PROMPT, max_new_tokens=48, greedy=True)
        show(f"passopt.Engine.load('{output.name}').generate({PROMPT!r}, max_new_tokens=48, greedy=True)", found)
        texts.append(str(found))
    same = texts[0] == texts[1]
    print(
        "both generate the same text"
        if same
        else "the texts part where two tokens are nearly equal, as ranks sum in another order"
    )
    return texts[0].strip()


_HEADER = ("family", "passes", "fp32 bytes", "2 ranks int8", "collectives", "twin error", "perplexity", "change")


def _figures(report: passopt.VerifyReport) -> list[str]:
    """Return the worst error against the graph's own dequantised codes, and the change of perplexity by int8."""
    twin = [row.error for row in report.rows if "dequantised" in row.comparison and row.scenario != "text"]
    (text,) = [row for row in report.rows if row.scenario == "text" and "original" in row.comparison]
    return [f"{max(twin):.1e}", text.note.removeprefix("perplexity "), f"{text.error:.3%}"]


def main() -> None:
    """Run both families, and print their table and the texts that their compiled models generate."""
    start = time.monotonic()
    root = Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="passopt-demo-"))
    root.mkdir(parents=True, exist_ok=True)
    try:
        found = {name: run_family(root, name, spec) for name, spec in FAMILIES.items()}
    finally:
        if len(sys.argv) <= 1:
            shutil.rmtree(root, ignore_errors=True)
    print()
    rows = [row for family, _ in found.values() for row in family]
    widths = [max(len(row[column]) for row in [_HEADER, *rows]) for column in range(len(_HEADER))]
    for row in [_HEADER, *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print(
        f"\nboth families verified in {time.monotonic() - start:.0f} s; their compiled int8 models continue the prompt:"
    )
    for name, (_, text) in found.items():
        print(f"{name}: {PROMPT} {' '.join(text.split())}")


if __name__ == "__main__":
    main()
