"""Export, rewrite and compile a checkpoint of a shape by passopt's commands, and measure its speed."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compiled.shapes import Memory, Shape, draw, draw_layer, evict, timed, tokens
from passopt.testing.checkpoints import CheckpointSpec, make_checkpoint

#: Positions that the model is made for.
POSITIONS = 4096
#: Tokens that the KV cache holds.
CAPACITY = 2048
FUSED = "baichuan2,slice-last-token"
PIPELINES = {
    "fp32": f"{FUSED},fold-norm-head",
    "int8": f"{FUSED},int8{{head=true}}",
    "W8A8": f"{FUSED},int8{{activations=dynamic,head=true}}",
    "W8A8 fp16": f"{FUSED},int8{{activations=dynamic,head=true}}",
    "W8A8 int8-cache": f"{FUSED},int8{{activations=dynamic,head=true}},int8-cache",
}
#: Pairs of published code and changed code. The changes make a checkpoint's model wider than its attention, as it is on
#: one of several ranks.
_NARROW = (
    (
        "self.hidden_size = config.hidden_size\n        self.num_heads",
        "self.hidden_size = {width}\n        self.num_heads",
    ),
    ("nn.Linear(self.hidden_size, 3 * self.hidden_size", "nn.Linear({hidden}, 3 * self.hidden_size"),
    ("self.num_heads * self.head_dim, self.hidden_size", "self.num_heads * self.head_dim, {hidden}"),
)
_LINEARS = {"o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


def write_checkpoint(folder: Path, shape: Shape) -> Path:
    """Write a stock checkpoint of a shape in bf16, and return its folder."""
    spec = CheckpointSpec(
        shape.family, shape.heads, shape.width, shape.intermediate, shape.layers, shape.vocabulary, POSITIONS
    )
    make_checkpoint(folder, spec, trained=False, weights=False)
    if shape.width != shape.hidden:
        _narrow_attention(folder / "modeling_baichuan.py", shape)
    _write_weights(folder / "model.safetensors", shape)
    return folder


def _narrow_attention(path: Path, shape: Shape) -> None:
    code = path.read_text()
    for published, narrow in _NARROW:
        if code.count(published) != 1:
            raise SystemExit(
                f"bench-tvm: {path.name} contains {published!r} {code.count(published)} times, expected once"
            )
        code = code.replace(published, narrow.format(width=shape.width, hidden=shape.hidden))
    path.write_text(code.replace("config.hidden_size", str(shape.hidden)))


def _write_weights(path: Path, shape: Shape) -> None:
    entries: dict[str, Any] = {}
    body = path.with_suffix(".body")
    with body.open("wb") as file:

        def add(name: str, *arrays: Any) -> None:
            start = file.tell()
            for array in arrays:
                file.write((array.view(np.uint32) >> np.uint32(16)).astype(np.uint16).data)
            rows = sum(array.shape[0] for array in arrays)
            sizes = [rows, *arrays[0].shape[1:]]
            entries[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [start, file.tell()]}

        add("model.embed_tokens.weight", draw("embed", (shape.vocabulary, shape.hidden)))
        for layer in range(shape.layers):
            prefix = f"model.layers.{layer}"
            for name, ours in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")):
                add(f"{prefix}.{name}.weight", draw(f"blk.{layer}.{ours}", (shape.hidden,)))
            weights = draw_layer(shape, layer)
            add(f"{prefix}.self_attn.W_pack.weight", *(next(weights)[1] for _ in "qkv"))
            for name, weight in weights:
                add(f"{prefix}.{_LINEARS[name]}.weight", weight)
        add("model.norm.weight", draw("output_norm", (shape.hidden,)))
        add("lm_head.weight", draw("head", (shape.vocabulary, shape.hidden)))
    _prepend_header(path, body, entries)


def _prepend_header(path: Path, body: Path, entries: dict[str, Any]) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    with path.open("wb") as file, body.open("rb") as source:
        file.write(struct.pack("<Q", len(header)) + header)
        file.flush()
        remaining = body.stat().st_size
        while remaining:
            remaining -= os.sendfile(file.fileno(), source.fileno(), body.stat().st_size - remaining, 1 << 28)
            file.seek(0, os.SEEK_END)
    body.unlink()


def passopt(*arguments: str) -> None:
    """Run one passopt command; if it fails, raise SystemExit with the last line of its stderr."""
    done = subprocess.run([sys.executable, "-m", "passopt", *arguments], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise SystemExit(f"passopt {arguments[0]}: {last}")


def export(folder: Path, shape: Shape, dtype: str) -> Path:
    """Export the stock checkpoint of a shape, and return the folder of the graph.

    The graph refers to the checkpoint's weights. Both are made once and serve all pipelines.
    """
    exported = folder / f"exported-{dtype}"
    if not exported.exists():
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = folder / "checkpoint"
        if not checkpoint.exists():
            write_checkpoint(checkpoint, shape)
        options = ("--dtype", dtype, "--weights", "reference", "--no-self-check", "--trust-remote-code")
        passopt("export", str(checkpoint), "-o", str(exported), *options)
    return exported


def write(folder: Path, shape: Shape, precision: str) -> None:
    """Compile a shape in a precision, a key of `PIPELINES`, into `folder`, from an export next to it."""
    exported = export(folder.parent, shape, "fp16" if precision.endswith("fp16") else "fp32")
    passopt("compile", str(exported), "--passes", PIPELINES[precision], "-o", str(folder), "--target", "llvm")


class Runner:
    """Run an engine whose caches hold random numbers, so that any past can be measured without computing it."""

    def __init__(self, folder: Path, threads: int, *, mapped: bool = False) -> None:
        from passopt.targets.tvm.engine.engine import Engine

        self.engine = Engine.load(folder, capacity=CAPACITY, threads=threads, copy_weights=not mapped)
        random = np.random.default_rng(1).standard_normal(1 << 20, np.float32)
        for cache in self.engine._past.tensors:
            flat = np.from_dlpack(cache).reshape(-1)
            # Codes of common size; where these are the cache, its fp32 tensors are scales.
            step = 40 if self.engine.library.cache.dtype == "int8" else 1
            numbers = random * step if flat.dtype == np.int8 else random / step
            flat[:] = np.resize(numbers, flat.size).astype(flat.dtype)

    def pretend(self, past: int) -> None:
        """Set the number of tokens in the cache to `past`; computing them would take longer than all measurements."""
        self.engine._past.columns = past

    def start(self) -> None:
        """Empty the KV cache and the CPU caches, before a prefill is measured."""
        self.pretend(0)
        evict()

    def run(self, ids: Any) -> Any:
        """Run `ids` after the past, and return the logits."""
        total = self.engine.past + len(ids)
        return self.engine.forward(ids[None], np.ones((1, total), np.int64))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of all points, the logits after the first prompt to compare, and the memory held."""
    shape = Shape(**job["shape"])
    (threads,) = job["threads"]
    memory = Memory()
    runner = Runner(Path(job["model"]), threads, mapped=job["mapped"])
    results: dict[str, Any] = {}
    for count in job["prefill"]:
        run = partial(runner.run, tokens(count, shape.vocabulary))
        results[f"prefill {count} {threads}"] = timed(run, seconds=job["seconds"], prepare=runner.start)
        if "logits" not in results:
            runner.pretend(0)
            results["logits"] = np.asarray(run()).ravel().tolist()
    for past in job["decode"]:
        run = partial(runner.run, tokens(1, shape.vocabulary))
        times = timed(run, seconds=job["seconds"], prepare=partial(runner.pretend, past))
        results[f"decode {past} {threads}"] = times
    return results | {"memory": memory.held(runner.engine.cache_bytes)}
