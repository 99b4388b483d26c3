"""Choose token windows from calibration sets, the same ones on every machine.

A set is read once as a stream. Every document has a number that only the seed, the format and its place in the set
decide; those with the smallest numbers are kept, within a budget of characters, so memory does not grow with the set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import blake3
import numpy as np

from passopt.frontends.calibration.documents import Source
from passopt.frontends.calibration.text_files import Document
from passopt.ir.errors import ModelError, UsageError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
#: From a document to its token ids; `begin` are the ids that the model expects before every text.
Encode: TypeAlias = Callable[[Document], list[int]]

#: The characters that are kept for each wanted token at first: more than any tokenizer needs, fewer than all.
_CHARACTERS = 8
_MORE = 8


@dataclasses.dataclass(frozen=True)
class Windows:
    """The chosen token windows.

    Attributes:
        ids: Token ids [windows, length], int64.
        counts: The number of windows from each set, in the order of the sets.
        digest: The blake3 digest of the ids as little-endian int32, row by row.
    """

    ids: Array
    counts: tuple[int, ...]
    digest: str


def choose_windows(
    sources: Sequence[Source], encode: Encode, *, count: int, length: int, seed: int, begin: Sequence[int] = ()
) -> Windows:
    """Return windows of token ids from all sets, in proportion to their weights.

    A document that is longer than a window gives one, from a random place; it gives further ones, disjoint, only where
    there are too few documents. Shorter ones are joined until a window is full, each with the tokens before it that the
    model expects.

    Args:
        sources: The sets.
        encode: The function from a document to its token ids, without `begin`.
        count: The number of windows.
        length: The number of tokens of each window.
        seed: Decides which documents and which parts of them are chosen.
        begin: The ids that begin every text for the model, such as that of `<s>`.

    Raises:
        UsageError: If a set would get no window, or a window is too short for `begin`.
        ModelError: If a set holds too few tokens, or is damaged.
    """
    if not sources:
        raise UsageError("there is no calibration set; name one, such as c4:c4-train.00000-of-01024.json.gz")
    if length <= len(begin):
        raise UsageError(f"a window of {length} tokens is too short: {len(begin)} of them begin every text")
    counts = share_out(count, [source.weight for source in sources])
    if 0 in counts:
        none = sources[counts.index(0)]
        raise UsageError(f"{none.path}: gets none of {count} windows by its weight {none.weight:g}; ask for more")
    chosen = [
        row
        for number, (source, wanted) in enumerate(zip(sources, counts, strict=True))
        for row in _windows_of(source, encode, wanted, length, f"{seed}:{number}:{source.format}", begin)
    ]
    ids = np.array(chosen, np.int64)
    return Windows(ids, tuple(counts), blake3.blake3(ids.astype("<i4").tobytes()).hexdigest())


def share_out(count: int, weights: Sequence[float]) -> list[int]:
    """Return whole numbers in proportion to the weights; `count` is their sum. Largest remainders are rounded up."""
    exact = [count * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    order = sorted(range(len(weights)), key=lambda index: (shares[index] - exact[index], index))
    for index in order[: count - sum(shares)]:
        shares[index] += 1
    return shares


def _windows_of(
    source: Source, encode: Encode, wanted: int, length: int, seed: str, begin: Sequence[int]
) -> list[list[int]]:
    budget = wanted * length * _CHARACTERS
    while True:
        kept, is_all = _smallest(source.documents(), budget, length * _CHARACTERS, seed)
        found = _filled(kept, encode, length, seed, begin, wanted)
        if len(found) == wanted:
            return found
        if is_all:
            raise ModelError(
                f"{source.path}: holds text for {len(found)} windows of {length} tokens, {wanted} are wanted; give "
                f"more text, or ask for fewer or shorter windows"
            )
        budget *= _MORE


def _smallest(
    documents: Iterable[Document], budget: int, largest: int, seed: str
) -> tuple[list[tuple[int, Document]], bool]:
    """Return the documents with the smallest numbers, in their order, and whether these are all that there are.

    Args:
        documents: The documents of a set.
        budget: The characters to keep.
        largest: The characters that a document counts at most.
        seed: Decides the numbers.
    """
    heap: list[tuple[int, int, Document]] = []
    kept, is_all = 0, True
    for place, document in enumerate(documents):
        if not len(document):
            continue
        number = _number(f"{seed}:{place}")
        if kept >= budget and number >= -heap[0][0]:
            is_all = False
            continue
        heapq.heappush(heap, (-number, -place, document))
        kept += min(len(document), largest)
        while kept - min(len(heap[0][2]), largest) >= budget:
            kept -= min(len(heapq.heappop(heap)[2]), largest)
            is_all = False
    return [(-number, document) for number, _, document in sorted(heap, key=lambda item: (-item[0], -item[1]))], is_all


def _filled(
    kept: Iterable[tuple[int, Document]], encode: Encode, length: int, seed: str, begin: Sequence[int], wanted: int
) -> list[list[int]]:
    """Return at most `wanted` windows that the documents fill: one from each, and further ones where that is too few.

    What is left of a joined window when it is full begins the next one.
    """
    found: list[tuple[int, list[int]]] = []
    joined: list[int] = []
    room = length - len(begin)
    for ids, number in _encoded(kept, encode):
        if sum(turn == 0 for turn, _ in found) == wanted:
            break
        if len(ids) >= room:
            places = _places(len(ids), room, f"{seed}:{number}")
            found += [(turn, [*begin, *ids[place : place + room]]) for turn, place in enumerate(places)]
            continue
        joined += [*begin, *ids]
        if len(joined) >= length:
            found.append((0, joined[:length]))
            joined = joined[length:]
    found.sort(key=lambda item: item[0])
    return [ids for _, ids in found[:wanted]]


def _places(tokens: int, room: int, seed: str) -> list[int]:
    """Return where disjoint windows of a long document begin, in a random order, from a random first place."""
    count = tokens // room
    first = _number(f"{seed}:first") % (tokens - count * room + 1)
    return sorted(range(first, first + count * room, room), key=lambda place: _number(f"{seed}:{place}"))


def _encoded(kept: Iterable[tuple[int, Document]], encode: Encode) -> Iterator[tuple[list[int], int]]:
    for number, document in kept:
        ids = encode(document)
        if ids:
            yield ids, number


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
