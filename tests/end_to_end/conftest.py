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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what starts from an exported family, which takes many seconds."""
    for item in items:
        if item.path.parent == Path(__file__).parent and {"root", "family", "long_model"} & set(
            getattr(item, "fixturenames", ())
        ):
            item.add_marker(pytest.mark.slow)


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
def rotary_fp16(root: Path) -> Path:
    return export(root, "rotary", "--dtype=fp16", "--no-self-check")


@pytest.fixture(scope="session")
def alibi_fp16(root: Path) -> Path:
    return export(root, "alibi", "--dtype=fp16", "--no-self-check")


@pytest.fixture(params=["rotary", "alibi"])
def family(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _code_is_generated_once(tmp_path_factory: pytest.TempPathFactory):
    """Copy the library of an equal module that was built before in this session: many tests compile the same model."""
    if importlib.util.find_spec("tvm") is None:
        yield
        return
    from passopt.targets.tvm.compiler import compile_models
    from passopt.targets.tvm.compiler.compile_models import build
    from passopt.targets.tvm.compiler.relax_steps import run_steps

    made: dict[tuple[Any, int], list[tuple[Any, Path]]] = defaultdict(list)
    folder = tmp_path_factory.mktemp("code")

    def build_once(lowered: Any, machine: Any, path: Path, on_step: Any = None) -> None:
        from tvm_ffi import structural_equal, structural_hash

        alike = made[machine, structural_hash(lowered.module, map_free_vars=True)]
        for module, library in alike:
            if structural_equal(module, lowered.module, map_free_vars=True):
                run_steps(lowered.module, machine.target(), on_step)
                shutil.copyfile(library, path)
                return
        build(lowered, machine, path, on_step)
        library = folder / f"{sum(map(len, made.values()))}.so"
        shutil.copyfile(path, library)
        alike.append((lowered.module, library))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_models, "build", build_once)
        yield
