"""Outliers in two channels of every norm: int8 activations lose the text, and `rotate` or `smooth` gives it back."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from passopt.cli import main
from passopt.ir.graph.decoder import decoder_of
from passopt.predictions.divergence import divergence
from passopt.targets.onnxruntime.joined_ranks import load_any
from passopt.targets.onnxruntime.session import Session
from passopt.testing.checkpoints import evaluation_text, training_text
from passopt.verification.sampling.cache_inputs import empty_cache

DYNAMIC = "int8{activations=dynamic}"
LENGTH, WINDOWS = 96, 24
#: The linears that read the norms of a layer.
READERS = ("W_pack", "gate_proj", "up_proj")


def amplified(folder: Path, output: Path) -> Path:
    """A copy of an exported family: two channels of its norms times 30, what reads them divided by 30."""
    shutil.copytree(folder, output)
    path = output / "weights.safetensors"
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    for name, entry in json.loads(data[8:start]).items():
        factor = 30 if "layernorm.weight" in name else 1 / 30 if any(part in name for part in READERS) else 1
        if factor != 1:
            weights = np.memmap(path, np.float32, "r+", start + entry["data_offsets"][0], tuple(entry["shape"]))
            weights[..., [5, 17]] *= np.float32(factor)
            weights.flush()
    return output


class Judge:
    """Measures how far quantised models are from an exported one on held-out text."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self._ids = np.array(tokenizer.encode(evaluation_text())[: LENGTH * WINDOWS]).reshape(WINDOWS, LENGTH)
        self._scratch = scratch
        self._reference = self._logits(folder)
        self._text = scratch / "training.txt"
        self._text.write_text(training_text(), encoding="utf-8")
        self._count = 0

    def _new(self) -> str:
        self._count += 1
        return str(self._scratch / f"{self._count}")

    def _logits(self, folder: Path) -> list[np.ndarray]:
        model = load_any(folder)
        session, decoder = Session(model, threads=1), decoder_of(model)
        assert decoder.layers
        same = {"attention_mask": np.ones((1, LENGTH), np.int64), "position_ids": np.arange(LENGTH)[None]}
        same |= empty_cache(model)
        return [session.run({"input_ids": row[None], **same})["logits"][0] for row in self._ids]

    def calibrate(self, folder: Path, passes: str) -> str:
        found = self._new()
        options = ["--data", str(self._text), "--collect", "inputs", "--nsamples", "32", "-o", found]
        assert main(["calibrate", str(folder), "--passes", passes, *options]) == 0
        return found

    def kl(self, folder: Path, pipeline: str) -> float:
        found = self._new()
        assert main(["run", str(folder), "--passes", pipeline, "-o", found]) == 0
        return divergence(zip(self._reference, self._logits(Path(found)), strict=True)).mean


def test_outliers_are_rotated_or_smoothed_away(family: Path, tmp_path: Path):
    judge = Judge(family, tmp_path)
    model = amplified(family, tmp_path / "outliers")
    assert judge.kl(model, "fuse") < 1e-6  # it computes the same function
    without = judge.kl(family, f"fuse,{DYNAMIC}")
    assert judge.kl(model, f"fuse,{DYNAMIC}") >= 20 * without
    plain = judge.calibrate(model, "fuse")
    assert judge.kl(model, f"fuse,smooth{{from={plain}}},{DYNAMIC}") <= 1.2 * without
    assert judge.kl(model, f"fuse,smooth{{targets=norm,from={plain}}},tp{{degree=2}},{DYNAMIC}") <= 1.2 * without
    assert judge.kl(model, f"fuse,rotate,{DYNAMIC}") <= 1.2 * without
    rotated = judge.calibrate(model, "fuse,rotate")
    assert judge.kl(model, f"fuse,rotate,smooth{{targets=down,from={rotated}}},{DYNAMIC}") <= 1.2 * without


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_ranks_of_rotated_models_are_the_same_in_every_order(family: Path, tmp_path: Path, degree: int, capsys):
    """Also with padding, and with int8 codes of fp32 weights; and they compute what was exported."""
    tp = f"tp{{degree={degree},pad=true}}"
    orders = [f"rotate,{tp},int8", f"{tp},rotate,int8", f"rotate,int8,{tp}"]
    folders = []
    for number, order in enumerate(orders):
        folders.append(tmp_path / str(number))
        assert main(["run", str(family), "--passes", f"baichuan2,{order}", "-o", str(folders[-1])]) == 0
    for rank in range(degree):
        one, *others = [(folder / f"rank{rank}" / "weights.safetensors").read_bytes() for folder in folders]
        assert all(other == one for other in others)
    assert main(["run", str(family), "--passes", f"baichuan2,rotate,{tp}", "-o", str(tmp_path / "fp32")]) == 0
    assert main(["verify", str(family), str(tmp_path / "fp32")]) == 0
    if degree == 2:  # layers of rotated models hand on other numbers
        assert main(["verify", str(family), str(tmp_path / "fp32"), "--layerwise"]) == 2
        assert "is not rotated in the reference and is rotated by seed 0" in capsys.readouterr().err


def test_16_bit_weights_are_rotated(alibi: Path, alibi_fp16: Path, tmp_path: Path):
    output = tmp_path / "out"
    assert main(["run", str(alibi_fp16), "--passes", "fuse,rotate", "--verify-each=numeric", "-o", str(output)]) == 0
    assert main(["verify", str(alibi), str(output), "--tolerance", "2e-2"]) == 0
