"""Export, shard, quantise, compile and verify models of real stock remote code, with tiny random weights.

    python tools/dev/stock.py DIR

DIR holds modeling_baichuan.py, or one folder per model that does. The stock files are copied to a temporary folder and
run there unmodified; nothing of them is kept.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from passopt.testing.checkpoints import CheckpointSpec, cast, random_weights, safetensors_bytes

CODE = "modeling_baichuan.py"
#: Small sizes, which differ from each other wherever the published sizes are equal or round.
ALIBI = CheckpointSpec("alibi", heads=6, hidden=48, intermediate=84, layers=2, vocab=108, max_positions=64)
ROTARY = CheckpointSpec("rotary", heads=4, hidden=48, intermediate=84, layers=3, vocab=108, max_positions=64)
PIPELINES = (
    "tp",
    "tp{degree=4,pad=true}",
    "split-packed-qkv,tp{degree=3,pad=true}",
    "int8",
    "tp,int8",
    "baichuan2",
    "baichuan2,tp{degree=4,pad=true}",
    "baichuan2,tp,int8",
)
#: The exported model is compiled after each of these passes, and the ranks of one pipeline are compiled too.
COMPILED = ("baichuan2,fold-norm-head", "baichuan2,int8{activations=dynamic,head=true}")
COMPILED_RANKS = "baichuan2,tp{degree=4,pad=true}"


def stock_folders(root: Path) -> list[Path]:
    """Return the folders with stock code, `root` itself or its children; raise SystemExit if there is none."""
    found = [folder for folder in (root, *sorted(root.glob("*"))) if (folder / CODE).is_file()]
    if not found:
        raise SystemExit(f"stock: neither {root} nor a folder in it holds {CODE}; give STOCK=DIR")
    return found


def make_small(stock: Path, target: Path) -> CheckpointSpec:
    """Write a checkpoint of stock code and configuration with small sizes and random bf16 weights; return its sizes."""
    target.mkdir()
    for file in stock.glob("*.py"):
        shutil.copyfile(file, target / file.name)
    spec = ROTARY if "RotaryEmbedding" in (stock / CODE).read_text() else ALIBI
    config = json.loads((stock / "config.json").read_text())
    config.update(
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_attention_heads=spec.heads,
        num_hidden_layers=spec.layers,
        vocab_size=spec.vocab,
        model_max_length=spec.max_positions,
    )
    if "max_position_embeddings" in config:
        config["max_position_embeddings"] = spec.max_positions
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").write_bytes(safetensors_bytes(cast(random_weights(spec), "bf16")))
    return spec


def passopt(folder: Path, *arguments: str) -> None:
    """Print and run one passopt command in `folder`; raise SystemExit if it fails."""
    print("$ passopt " + " ".join(f"'{item}'" if "{" in item else item for item in arguments), flush=True)
    done = subprocess.run([sys.executable, "-m", "passopt", *arguments], cwd=folder, check=False)
    if done.returncode:
        raise SystemExit(f"stock: passopt {arguments[0]} failed with exit code {done.returncode}")


def compiled(root: Path, reference: str, model: str, output: str, *options: str) -> None:
    """Compile a model, and verify the library against the exported model `reference`."""
    passopt(root, "compile", model, "-o", output, *options)
    passopt(root, "verify", reference, output)


def check(stock: Path, root: Path) -> None:
    """Export one stock model, run every pipeline on it, and verify each result."""
    name = f"{stock.name}-small"
    spec = make_small(stock, root / name)
    print(f"\n== {stock.name}: {dataclasses.asdict(spec)}", flush=True)
    for dtype in ("fp32", "fp16"):
        passopt(root, "export", name, "-o", f"{name}-{dtype}", "--dtype", dtype, "--trust-remote-code")
        model = f"{name}-{dtype}/model.onnx"
        for pipeline in PIPELINES:
            output = f"{name}-{dtype}-{PIPELINES.index(pipeline)}"
            passopt(root, "run", model, "--passes", pipeline, "-o", output)
            passopt(root, "verify", model, output)
            if pipeline == COMPILED_RANKS:
                compiled(root, model, output, f"{output}-compiled")
        for passes in COMPILED:
            compiled(root, model, model, f"{name}-{dtype}-compiled-{COMPILED.index(passes)}", "--passes", passes)


def main() -> None:
    """Check every stock model in the folder that the command line names."""
    if len(sys.argv) != 2 or not sys.argv[1]:
        raise SystemExit("stock: no stock code; run make stock STOCK=DIR with the published remote code in DIR")
    folders = stock_folders(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory(prefix="passopt-stock-") as folder:
        for stock in folders:
            check(stock, Path(folder))
    print(f"\nstock: {len(folders)} models exported, transformed and verified")


if __name__ == "__main__":
    main()
