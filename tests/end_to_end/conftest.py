"""Both trained families, exported once by the command line: what every test here starts from."""

from __future__ import annotations

import importlib.util
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session", autouse=True)
def _code_is_generated_once(tmp_path_factory: pytest.TempPathFactory):
    """Copy the library of a module that was already built in this session: many tests compile the same model."""
    if importlib.util.find_spec("tvm") is None:
        yield
        return
    from passopt.targets.tvm.compiler import compile_models
    from passopt.targets.tvm.compiler.code_generation import write_code

    made: dict[int, list[tuple[Any, str, Path, Any]]] = defaultdict(list)
    folder = tmp_path_factory.mktemp("code")

    def write_once(module: Any, target: Any, path: Path) -> Any:
        from tvm_ffi import structural_equal, structural_hash

        alike = made[structural_hash(module, map_free_vars=True)]
        for other, its_target, library, built in alike:
            if its_target == str(target) and structural_equal(other, module, map_free_vars=True):
                shutil.copyfile(library, path)
                return built
        built = write_code(module, target, path)
        library = folder / f"{sum(map(len, made.values()))}.so"
        shutil.copyfile(path, library)
        alike.append((module, str(target), library, built))
        return built

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_models, "write_code", write_once)
        yield
