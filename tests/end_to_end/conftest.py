"""Both trained families, exported once by the command line: what every test here starts from."""

from __future__ import annotations

from pathlib import Path

import pytest

from passopt.cli import main
from passopt.testing.checkpoints import ALIBI, ROTARY, evaluation_text, make_checkpoint


def export(root: Path, name: str, *options: str) -> Path:
    """The folder of an exported checkpoint `root/name`."""
    output = root / f"{name}{''.join(options)}"
    assert main(["export", str(root / name), "-o", str(output), "--trust-remote-code", *options]) == 0
    return output


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints `rotary` (sharded .bin, as published) and `alibi` (safetensors), and a held-out `text.txt`."""
    folder = tmp_path_factory.mktemp("models")
    make_checkpoint(folder / "rotary", ROTARY, format="bin", shards=2)
    make_checkpoint(folder / "alibi", ALIBI)
    (folder / "text.txt").write_text(evaluation_text(), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def rotary(root: Path) -> Path:
    return export(root, "rotary", "--dtype=fp32")


@pytest.fixture(scope="session")
def alibi(root: Path) -> Path:
    return export(root, "alibi", "--dtype=fp32", "--no-self-check")


@pytest.fixture(scope="session")
def alibi_fp16(root: Path) -> Path:
    return export(root, "alibi", "--dtype=fp16", "--no-self-check")


@pytest.fixture(params=["rotary", "alibi"])
def family(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder
