"""The engine on a library made by hand: what it computes, what it keeps, and what it refuses before anything runs."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from passopt.ir.errors import ModelError, UsageError
from passopt.targets.tvm.compiled_folder import CodeFile, Library, read_library
from passopt.targets.tvm.engine import engine as engine_module
from passopt.targets.tvm.engine.engine import Engine

IDS = np.array([[3, 1, 4, 1, 5], [0, 0, 9, 2, 6]])
MASK = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
POSITIONS = np.array([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])


def edit(folder: Path, **changes: Any) -> None:
    library = read_library(folder)
    assert isinstance(library, Library)
    dataclasses.replace(library, **changes).write(folder)


@pytest.mark.parametrize("kind", ["in-place", "functional"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_steps_of_any_size_give_the_same_logits(make_tiny_library, kind: str, dtype: str):
    tiny = make_tiny_library(kind, dtype)
    engine = Engine.load(tiny.folder, batch=2, capacity=20)
    for sizes in ([5], [2, 3], [1, 1, 1, 1, 1]):
        engine.reset()
        done = 0
        for size in sizes:
            end = done + size
            logits = engine.forward(IDS[:, done:end], MASK[:, :end])
            expected = tiny.logits(IDS[:, :end], MASK[:, :end], POSITIONS[:, done:end])
            np.testing.assert_array_equal(logits, expected)
            done = end
            assert engine.past == done


def test_a_long_prefill_runs_in_parts_of_about_the_same_length(make_tiny_library, monkeypatch: pytest.MonkeyPatch):
    tiny = make_tiny_library()
    engine = Engine.load(tiny.folder, batch=2, capacity=20)
    lengths: list[int] = []
    take = engine._past.take
    monkeypatch.setattr(engine._past, "take", lambda result, seq: lengths.append(seq) or take(result, seq))
    monkeypatch.setattr(engine_module, "PREFILL_COLUMNS", 4)
    # Every column of this model says what the last one of its part sees.
    parts = [tiny.logits(IDS[:, :stop], MASK[:, :stop], POSITIONS[:, start:stop]) for start, stop in ((0, 3), (3, 5))]
    np.testing.assert_array_equal(engine.forward(IDS, MASK), np.concatenate(parts, axis=1))
    assert lengths == [3, 2]


def test_a_part_that_fails_takes_back_those_before_it(make_tiny_library, monkeypatch: pytest.MonkeyPatch):
    engine = Engine.load(make_tiny_library().folder, batch=2, capacity=20)
    engine.forward(IDS[:, :1], MASK[:, :1])
    machine = engine._machine
    calls: list[int] = []

    def fails_at_second(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no more memory")
        return machine(*arguments)

    monkeypatch.setattr(engine, "_machine", fails_at_second)
    monkeypatch.setattr(engine_module, "PREFILL_COLUMNS", 2)
    with pytest.raises(RuntimeError, match="no more memory"):
        engine.forward(IDS[:, 1:], MASK)
    assert engine.past == 1


def test_what_the_library_refuses_is_told_with_its_name(make_tiny_library):
    """As shapes would be that it was not compiled for: here fewer parameters."""
    tiny = make_tiny_library()
    engine = Engine.load(tiny.folder, batch=2, capacity=20)
    engine._parameters = engine._parameters[:1]
    with pytest.raises(ModelError, match=r"lib\.so: failed: "):
        engine.forward(IDS, MASK)
    assert engine.past == 0


def test_caches_must_fit_beside_a_copy(tiny, monkeypatch: pytest.MonkeyPatch):
    library = read_library(tiny.folder)
    assert isinstance(library, Library)
    needed = library.cache.nbytes(2, 33) + library.weights.nbytes
    monkeypatch.setattr("passopt.targets.tvm.engine.available_memory.available_memory", lambda: needed - 1)
    monkeypatch.setattr(engine_module, "WeightsMap", None)  # nothing is read
    with pytest.raises(UsageError, match="no memory for caches of .* beside a copy of the weights"):
        Engine.load(tiny.folder, batch=2, capacity=33, copy_weights=True)


def test_memory_that_was_only_asked_for_is_not_given_back(tiny, monkeypatch: pytest.MonkeyPatch):
    engine = Engine.load(tiny.folder, batch=2, capacity=320)
    engine.forward(IDS, MASK)
    layout = engine.library.cache
    needed, held = layout.nbytes(2, 640), layout.nbytes(2, 5)
    monkeypatch.setattr("passopt.targets.tvm.engine.available_memory.available_memory", lambda: needed - held - 1)
    with pytest.raises(UsageError, match="no memory for caches"):
        engine.allocate(2, 640)
    monkeypatch.setattr("passopt.targets.tvm.engine.available_memory.available_memory", lambda: needed - held)
    engine.allocate(2, 640)
    assert engine.capacity == 640


@pytest.mark.parametrize("kind", ["in-place", "functional"])
def test_truncated_columns_are_forgotten(make_tiny_library, kind: str):
    tiny = make_tiny_library(kind, "bf16")
    engine = Engine.load(tiny.folder, batch=2, capacity=20)
    engine.forward(IDS, MASK)
    engine.truncate(2)
    other = np.array([[7, 7], [8, 8]])
    logits = engine.forward(other, np.ones((2, 4)).astype(int))
    kept = np.concatenate([IDS[:, :2], other], axis=1)
    np.testing.assert_array_equal(logits, tiny.logits(kept, np.ones((2, 4)), [[2, 3], [2, 3]]))
    with pytest.raises(UsageError, match="cannot keep 5 columns of 4"):
        engine.truncate(5)


def test_a_model_without_positions_gets_none(make_tiny_library):
    tiny = make_tiny_library(positions=False)
    engine = Engine.load(tiny.folder, batch=2)
    np.testing.assert_array_equal(engine.forward(IDS, MASK), tiny.logits(IDS, MASK, np.zeros_like(IDS)))
    assert not engine.takes_positions
    with pytest.raises(UsageError, match="hold 48"):
        engine.forward(np.ones((2, 44), int), np.ones((2, 49), int))
    with pytest.raises(UsageError, match="41 columns: the model has 40 positions"):
        engine.forward(np.ones((2, 36), int), np.ones((2, 41), int))


def test_other_sequences_get_other_room(tiny):
    engine = Engine.load(tiny.folder, batch=2, capacity=5)
    engine.forward(IDS, MASK)
    engine.allocate(1, 33)
    assert (engine.past, engine.batch, engine.capacity) == (0, 1, 48)
    np.testing.assert_array_equal(engine.forward([[3]], [[1]]), tiny.logits([[3]], [[1]], [[0]]))


def test_caches_take_the_bytes_of_the_arithmetic(tiny):
    engine = Engine.load(tiny.folder, batch=3, capacity=33)
    held = sum(np.prod(tensor.shape) * tensor.dtype.itemsize for tensor in engine._past.tensors)
    assert engine.cache_bytes == held == 2 * 1 * 3 * 1 * 48 * 6 * 4


def test_capacity_defaults_to_the_positions_of_the_model(tiny):
    assert Engine.load(tiny.folder).capacity == 48


@pytest.mark.parametrize(
    ("ids", "mask", "positions", "says"),
    [
        (np.zeros((1, 0), int), [[]], None, r"ids have shape \[1, 0\]"),
        ([[1], [2]], [[1], [1]], None, r"ids have shape \[2, 1\], expected \[1"),
        ([1], [1], None, r"ids have shape \[1\]"),
        ([[1.5]], [[1]], None, "ids are float64, expected whole numbers"),
        ([[4, 11]], [[1, 1]], None, r"token id 11 is outside of the vocabulary \(0 to 10\)"),
        ([[-1]], [[1]], None, "token id -1"),
        ([[1, 2]], [[1]], None, r"mask has shape \[1, 1\], expected \[1, 2\]"),
        ([[1, 2]], [[1, 1]], [[1]], r"positions have shape \[1, 1\]"),
        ([[1]], [[1]], [[40]], "position 40: the model has 40"),
        ([[1]], [[1]], [[-2]], "position -2"),
        ([[1] * 17], [[1] * 17], None, "17 columns after 0 make 17; the caches hold 16"),
    ],
)
def test_wrong_input_is_refused_before_anything_runs(tiny, ids, mask, positions, says: str):
    engine = Engine.load(tiny.folder, capacity=16)
    with pytest.raises(UsageError, match=says):
        engine.forward(ids, mask, positions)
    assert engine.past == 0


def test_a_step_beyond_the_capacity_leaves_the_engine_as_it_was(tiny):
    engine = Engine.load(tiny.folder, capacity=16)
    engine.forward([[1] * 15], [[1] * 15])
    engine.forward([[2]], [[1] * 16])
    with pytest.raises(UsageError, match="1 columns after 16 make 17; the caches hold 16"):
        engine.forward([[3]], [[1] * 17])
    assert engine.past == 16


def test_a_prompt_longer_than_the_model_is_refused(tiny):
    engine = Engine.load(tiny.folder, capacity=64)
    with pytest.raises(UsageError, match="position 40: the model has 40 positions"):
        engine.forward([[1] * 41], [[1] * 41])


@pytest.mark.parametrize(("batch", "capacity"), [(0, 5), (1, 0)])
def test_no_room_is_refused(tiny, batch: int, capacity: int):
    with pytest.raises(UsageError, match="at least 1"):
        Engine.load(tiny.folder, batch=batch, capacity=capacity)


def test_caches_larger_than_the_address_space_are_refused(tiny):
    with pytest.raises(UsageError, match="smaller capacity"):
        Engine.load(tiny.folder, batch=1 << 20, capacity=1 << 40)


def test_another_cpu_is_refused(folder: Path):
    edit(folder, features=("avx2", "made-up"), mcpu="icelake-server", isa="avx512-vnni")
    with pytest.raises(ModelError) as caught:
        Engine.load(folder)
    assert "icelake-server (avx512-vnni) and needs made-up" in str(caught.value)
    assert "`mcpu`" in str(caught.value)


def test_a_damaged_library_is_refused(folder: Path):
    code = bytearray((folder / "lib.so").read_bytes())
    code[len(code) // 2] ^= 1
    (folder / "lib.so").write_bytes(code)
    with pytest.raises(ModelError, match=r"lib\.so: is not the library that was compiled"):
        Engine.load(folder)


@pytest.mark.parametrize("name", ["lib.so", "weights.safetensors", "library.json"])
def test_a_truncated_or_missing_file_is_refused(folder: Path, name: str):
    content = (folder / name).read_bytes()
    for kept in (len(content) - 1, len(content) // 2, 9, 0):
        (folder / name).write_bytes(content[:kept])
        if name == "library.json" and kept == len(content) - 1:
            continue  # the last newline
        with pytest.raises(ModelError, match=name):
            Engine.load(folder)
    (folder / name).unlink()
    with pytest.raises(ModelError, match=name):
        Engine.load(folder)


@pytest.mark.parametrize("content", [b"", b"no library", b"\x7fELF" + bytes(64)])
def test_a_file_that_is_no_library_is_refused(folder: Path, content: bytes):
    import blake3

    (folder / "lib.so").write_bytes(content)
    edit(folder, library=CodeFile("lib.so", blake3.blake3(content).hexdigest()))
    with pytest.raises(ModelError, match=r"lib\.so: cannot be loaded"):
        Engine.load(folder)


def test_a_library_without_the_function_is_refused(folder: Path):
    edit(folder, function="other")
    with pytest.raises(ModelError, match=r"lib\.so: cannot be loaded"):
        Engine.load(folder)


def test_one_rank_is_refused(folder: Path):
    edit(folder, rank=1, degree=2)
    with pytest.raises(ModelError, match="rank 1 of 2"):
        Engine.load(folder)


@pytest.mark.parametrize("threads", range(1, 1 + min(4, len(os.sched_getaffinity(0)))))
def test_threads_are_an_argument(tiny, threads: int):
    """In a process of its own: what other tests load may pin threads of theirs."""
    code = f"""
import os
from pathlib import Path
from passopt.targets.tvm.engine import virtual_machine
from passopt.targets.tvm.engine.engine import Engine
engine = Engine.load(Path({str(tiny.folder)!r}), threads={threads})
print(engine._machine._caller.submit(virtual_machine.runtime().get_global_func("runtime.NumThreads")).result())
engine.forward([[3, 1]], [[1, 1]])
whole = os.sched_getaffinity(0)
print({{os.sched_getaffinity(int(task)) == whole for task in os.listdir("/proc/self/task")}})
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(threads), "{True}"]


def test_no_thread_and_more_threads_than_processors_are_refused(tiny):
    with pytest.raises(UsageError, match="0 threads"):
        Engine.load(tiny.folder, threads=0)
    processors = len(os.sched_getaffinity(0))
    with pytest.raises(UsageError, match=f"on {processors} processors"):
        Engine.load(tiny.folder, threads=processors + 1)


def test_a_fresh_process_needs_neither_torch_nor_onnx_nor_the_compiler(tiny):
    code = f"""
import sys
blocked = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "tvm", "ml_dtypes")
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocker())
from pathlib import Path
from passopt.targets.tvm.engine.engine import Engine
engine = Engine.load(Path({str(tiny.folder)!r}))
print(engine.forward([[3, 1]], [[1, 1]]).shape)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["(1, 2, 11)"]
