"""Describe the models that are measured: their shapes, their random weights, and how a measurement is repeated.

This needs numpy and nothing else, because llama.cpp's program imports it in an environment of its own. Weights are a
function of their name and shape alone, so every candidate computes with the same numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

HEAD_DIM = 128
#: Numbers of tokens in the cache behind which decode is measured.
PASTS = (128, 512, 2000)
#: Numbers of tokens of the prompts over which prefill is measured.
PREFILLS = (128, 512, 1024)
#: Rows of embedding and head where only layers are measured.
FEW_TOKENS = 512
#: Random numbers that all weights are taken from.
POOL = (1 << 22) + 12_347


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a decoder, or of the part of it that one of several ranks holds.

    Attributes:
        family: Positions by rotation (7B) or by ALiBi (13B).
        hidden: Channels of the model.
        intermediate: Channels inside of the MLP; of the rank, if it is one of several.
        heads: Attention heads; of the rank, if it is one of several.
        layers: Number of layers.
        vocabulary: Rows of embedding and head.
    """

    family: Literal["rotary", "alibi"]
    hidden: int
    intermediate: int
    heads: int
    layers: int
    vocabulary: int = FEW_TOKENS

    @property
    def width(self) -> int:
        """Return the channels of all heads."""
        return self.heads * HEAD_DIM

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the shape [out, in] of each linear of a layer, in the order of the graph."""
        hidden, width, wide = self.hidden, self.width, self.intermediate
        return {
            "q": (width, hidden),
            "k": (width, hidden),
            "v": (width, hidden),
            "o": (hidden, width),
            "gate": (wide, hidden),
            "up": (wide, hidden),
            "down": (hidden, wide),
        }

    @property
    def is_whole(self) -> bool:
        """Return whether embedding and head have the size of a real model, and not of layers to be measured alone."""
        return self.vocabulary > FEW_TOKENS

    @property
    def layer_parameters(self) -> int:
        """Return the number of linear weights in one layer."""
        return sum(rows * columns for rows, columns in self.linears().values())

    @property
    def read_parameters(self) -> int:
        """Return the number of linear weights that one decoding step reads: those of all layers and the head."""
        return self.layers * self.layer_parameters + self.vocabulary * self.hidden

    def with_layers(self, layers: int) -> Shape:
        """Return the same shape with another number of layers."""
        return dataclasses.replace(self, layers=layers)

    def enough_layers(self, bytes_per_weight: float, working_set: int = 1 << 30) -> int:
        """Return how many different layers take `working_set` bytes, of which no cache holds a useful part."""
        return -(-working_set // int(bytes_per_weight * self.layer_parameters))


LAYERS = {
    "7B": Shape("rotary", 4096, 11_008, 32, 1),
    "13B": Shape("alibi", 5120, 13_696, 40, 1),
    "7B tp4": Shape("rotary", 4096, 11_008 // 4, 8, 1),
    "13B tp4": Shape("alibi", 5120, 13_696 // 4, 10, 1),
}
WHOLE_LABEL = "whole 7B"
WHOLE = Shape("rotary", 4096, 11_008, 32, 32, 125_696)


@functools.cache
def _pool() -> Array:
    return np.random.default_rng(0).standard_normal(POOL, np.float32)


def draw(name: str, shape: tuple[int, ...]) -> Array:
    """Return the fp32 weight called `name`, with finite random numbers that are rounded to bf16.

    They are scaled so that activations keep their size from layer to layer. Rows of the head have length 1, so
    that a model which normalises them computes the same.
    """
    size = int(np.prod(shape))
    offset = zlib.crc32(name.encode()) % POOL
    flat = np.resize(np.roll(_pool(), offset), size).reshape(shape)
    if len(shape) == 1:
        flat = np.float32(1) + np.float32(0.1) * flat
    elif name == "head":
        flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    else:
        flat *= np.float32(0.5 if name == "embed" else shape[-1] ** -0.5)
    # Round to nearest: cutting off the low bits would make every row shorter.
    return ((flat.view(np.uint32) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)


def draw_layer(shape: Shape, layer: int) -> Iterator[tuple[str, Array]]:
    """Yield the linears of a layer with their short names, one at a time; they differ from layer to layer."""
    for name, sizes in shape.linears().items():
        yield name, draw(f"{layer}.{name}", sizes)


def quantized(weight: Array) -> tuple[Array, Array]:
    """Return int8 codes [out, in] and fp32 scales [out] of a weight, symmetric, as the pipeline `int8` makes them."""
    scales = np.abs(weight).max(axis=1) / np.float32(127)
    codes = np.clip(np.rint(weight / scales[:, None]), -127, 127).astype(np.int8)
    return codes, scales


def slopes(heads: int) -> Array:
    """Return the slopes [heads] of ALiBi as Baichuan computes them.

    The first ones, as many as the largest power of two, fall from the steepest on; the rest lie between them.
    """
    nearest = 1 << (heads.bit_length() - 1)
    first = [2.0 ** (-8.0 * (index + 1) / nearest) for index in range(nearest)]
    rest = [2.0 ** (-4.0 * (2 * index + 1) / nearest) for index in range(heads - nearest)]
    return np.array(first + rest, np.float32)


def tokens(count: int, vocabulary: int) -> Array:
    """Return `count` random token numbers, always the same ones for the same count and vocabulary."""
    return np.random.default_rng(count).integers(5, vocabulary, count)


def timed(run: Callable[[], object], *, seconds: float, prepare: Callable[[], object] | None = None) -> list[float]:
    """Repeat `run` for about `seconds`, and return the seconds of each repeat.

    The first repeat is not counted, and 3 to 30 others are. A repeat that takes longer than a third of `seconds` may
    be the only one; if the first takes longer than `seconds`, it counts, since noise averages out within it.

    Args:
        run: The work to measure.
        seconds: About how long to repeat it.
        prepare: Called before each repeat, outside of the measured time.
    """
    times: list[float] = []
    start = time.perf_counter()
    for repeat in range(31):
        if prepare:
            prepare()
        before = time.perf_counter()
        run()
        now = time.perf_counter()
        if repeat or now - before > seconds:
            times.append(now - before)
        if len(times) >= (1 if now - before > seconds / 3 else 3) and now - start > seconds:
            break
    return times


class Memory:
    """Measure the memory that this process takes from the creation of this object on, the model included."""

    def __init__(self) -> None:
        self._before = self._now()

    @staticmethod
    def _now() -> dict[str, int]:
        fields = {"Anonymous": "private", "AnonHugePages": "huge", "Rss": "mapped"}
        lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines())
        found = {fields[key[:-1]]: 1024 * int(rest[0]) for key, *rest in lines if key[:-1] in fields}
        return found | {"mapped": found["mapped"] - found["private"]}

    def held(self, caches: int) -> dict[str, int]:
        """Return the bytes that the process has taken, without those that `evict` needs, by kind.

        Args:
            caches: Bytes of the key/value caches.

        Returns:
            `private`: bytes of the process's own memory. `huge`: those of them in huge pages. `mapped`: bytes of mapped
            files. `other`: private bytes besides the caches, which are weights, intermediate results and code.
        """
        found = {name: nbytes - self._before[name] for name, nbytes in self._now().items()}
        if _scratch.cache_info().currsize:
            found = found | {name: found[name] - _SCRATCH for name in ("private", "huge")}
        return found | {"other": found["private"] - caches}


def _largest_cache() -> int:
    """Return the bytes of the first CPU's largest cache as Linux lists it, or 0 where it does not."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=0)


_SCRATCH = max(1 << 28, 2 * _largest_cache())


def evict() -> None:
    """Empty the CPU caches of everything else, by reading and writing at least twice as many bytes as they hold."""
    _scratch()[:] += 1


@functools.cache
def _scratch() -> Array:
    return np.zeros(_SCRATCH, np.uint8)
