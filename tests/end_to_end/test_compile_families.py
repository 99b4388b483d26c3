"""Other decoders than Baichuan2: grouped queries, one key head, soft caps, biases, ALiBi that counts by the mask."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from passopt.cli import main
from passopt.testing.families import make_family_checkpoint

pytest.importorskip("tvm")
pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "falcon-mqa", "bloom", "gpt2", "gemma2"])
def test_family_equals_onnxruntime(tmp_path: Path, capsys, name: str):
    make_family_checkpoint(tmp_path / "checkpoint", name)
    model = tmp_path / "model"
    assert main(["export", str(tmp_path / "checkpoint"), "-o", str(model), "--dtype", "fp32", "--no-self-check"]) == 0
    output = tmp_path / "compiled"
    assert main(["compile", str(model), "-o", str(output), "--passes", "fuse"]) == 0
    capsys.readouterr()
    assert main(["verify", str(model), str(output), "--tolerance", "1e-4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {"left padding, then decode", "chunked prefill"} <= {row["scenario"] for row in rows}
