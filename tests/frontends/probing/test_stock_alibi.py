"""The ALiBi mask of a class against slope × column, at all lengths that it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from passopt.frontends.probing.stock_alibi import StockAlibi, measure
from passopt.ir.errors import ModelError
from passopt.ir.graph.alibi import alibi_slopes

HEADS, POSITIONS = 6, 72
SLOPES = torch.from_numpy(alibi_slopes(HEADS))[:, None, None]


def causal(length: int) -> torch.Tensor:
    return torch.triu(torch.full((length, length), float("-inf")), 1)[None]


def linear(length: int) -> torch.Tensor:
    return causal(length) + SLOPES * torch.arange(length)


class Body:
    """A body that builds its mask once for all its positions, as the stock one does, or anew for every length."""

    def __init__(self, mask: Callable[[int], Any], positions: int, kept: bool) -> None:
        self.n_head, self.max_cache_pos = HEADS, positions
        self._build, self._kept = mask, kept
        self._mask: Any = None

    def get_alibi_mask(self, embeddings: torch.Tensor, length: int) -> Any:
        if not self._kept:
            return self._build(length)
        if self._mask is None or length > self.max_cache_pos:
            self.max_cache_pos = max(length, self.max_cache_pos)
            self._mask = self._build(self.max_cache_pos)
        return self._mask[:, :length, :length]


def measured(mask: Callable[[int], Any], *, kept: bool = True, positions: int = POSITIONS) -> StockAlibi:
    return measure(lambda: Body(mask, positions, kept), {20, 45}, "X")


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("positions", [2, 7, 72, 1000])
def test_the_formula_is_recognised(kept: bool, positions: int) -> None:
    found = measured(linear, kept=kept, positions=positions)
    assert np.array_equal(found.slopes, alibi_slopes(HEADS))
    assert found.longest is None


@pytest.mark.parametrize("kept", [True, False])
def test_a_constant_per_row_does_not_matter(kept: bool) -> None:
    """As in the paper, where the bias is slope × distance; a softmax over columns takes the difference away."""

    def distances(length: int) -> torch.Tensor:
        return causal(length) + SLOPES * (torch.arange(length)[None, :] - torch.arange(length)[:, None])

    found = measured(distances, kept=kept)
    assert np.allclose(found.slopes, alibi_slopes(HEADS), rtol=1e-6)


def test_other_slopes_are_measured() -> None:
    """Position interpolation divides all slopes by one number."""
    found = measured(lambda length: causal(length) + SLOPES / 2 * torch.arange(length))
    assert np.array_equal(found.slopes, alibi_slopes(HEADS) / 2)
    assert found.longest is None


def scaled(length: int) -> torch.Tensor:
    return causal(length) + SLOPES / max(1, length / 36) * torch.arange(length)


def test_slopes_of_the_longest_length_are_measured_and_their_end_is_known() -> None:
    """The class scales by the length of the mask that it keeps, and builds another one beyond that."""
    found = measured(scaled)
    assert np.allclose(found.slopes, alibi_slopes(HEADS) / 2, rtol=1e-6)
    assert found.longest == POSITIONS


def test_slopes_that_are_scaled_beyond_the_positions_only_have_an_end() -> None:
    found = measured(scaled, positions=36)
    assert (found.slopes == alibi_slopes(HEADS)).all()
    assert found.longest == 36


def test_slopes_that_depend_on_the_length_are_refused() -> None:
    with pytest.raises(ModelError, match=r"X has ALiBi slopes that depend on the length: head 0 has .* of 72\."):
        measured(scaled, kept=False)


@pytest.mark.parametrize("number", [20, 45])
def test_slopes_that_change_at_a_number_of_the_configuration_are_refused(number: int) -> None:
    def one_length(length: int) -> torch.Tensor:
        return linear(length) * (2.0 if length == number + 1 else 1.0)

    with pytest.raises(ModelError, match=rf"slopes that depend on the length: .* at {number + 1} positions"):
        measured(one_length, kept=False)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (lambda n: causal(n) + SLOPES * torch.arange(n).sqrt(), "is not slope × column: at 72 positions, head 0"),
        (lambda n: (causal(n) + 1.1 * SLOPES * torch.arange(n)).half(), "is not slope × column"),
        (lambda n: linear(n) + 0.01 * torch.tril(torch.ones(n, n), -40), "is not slope × column"),
        (lambda n: torch.triu(linear(n)[0], 0)[None].expand(HEADS, -1, -1), "hides other positions|not slope"),
        (lambda n: SLOPES * torch.arange(n) + torch.triu(torch.full((n, n), -1e30), 2), "hides other positions"),
        (lambda n: (SLOPES * torch.arange(n)).expand(HEADS, n, n), "hides other positions"),
        (lambda n: linear(n)[None], r"of shape \[1, 6, .*\], expected \[6, rows, 72\]"),
    ],
)
def test_other_masks_are_refused(mask: Callable[[int], torch.Tensor], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        measured(mask, kept=False)


def test_a_mask_with_something_beside_it_is_refused() -> None:
    with pytest.raises(ModelError, match="is a tuple, expected"):
        measured(lambda length: (linear(length), 1.0), kept=False)


def test_a_mask_that_cannot_be_built_in_part_is_built_whole() -> None:
    def combined(length: int) -> torch.Tensor:
        return causal(length) + SLOPES * torch.arange(length) + torch.zeros(length, length)

    assert (measured(combined).slopes == alibi_slopes(HEADS)).all()


def test_a_mask_that_is_too_large_to_build_whole_is_refused() -> None:
    def combined(length: int) -> torch.Tensor:
        return causal(length) + torch.zeros(length, length)

    with pytest.raises(ModelError, match=r"takes 2\.1 GiB to build for 4800 positions"):
        measured(combined, positions=4800)


class Stepwise(Body):
    """A body that looks at how many tokens are new."""

    def __init__(self, change: Callable[[torch.Tensor, int], torch.Tensor], *, cut: bool) -> None:
        super().__init__(linear, POSITIONS, kept=True)
        self._change, self._cut = change, cut

    def get_alibi_mask(self, embeddings: torch.Tensor, length: int) -> Any:
        mask = super().get_alibi_mask(embeddings, length)
        new = embeddings.shape[1]
        return self._change(mask[:, -new:] if self._cut else mask, new)


@pytest.mark.parametrize("cut", [True, False])
def test_steps_of_any_number_of_tokens_are_measured(cut: bool) -> None:
    found = measure(lambda: Stepwise(lambda mask, _: mask, cut=cut), {20}, "X")
    assert np.array_equal(found.slopes, alibi_slopes(HEADS))
    for change in (
        lambda mask, new: mask * 0.5 if new == 1 else mask,
        lambda mask, new: mask * 0.5 if 1 < new < mask.shape[2] else mask,
    ):
        with pytest.raises(ModelError, match="ALiBi slopes that depend on the number of new tokens: head 0"):
            measure(lambda change=change: Stepwise(change, cut=cut), {20}, "X")  # type: ignore[misc]


@pytest.mark.parametrize("least", [1, 2])
def test_a_window_in_steps_alone_is_refused(least: int) -> None:
    def window(mask: torch.Tensor, new: int) -> torch.Tensor:
        columns = torch.arange(mask.shape[2])
        return mask - 1.0 * (columns < mask.shape[2] - 8) if least <= new < mask.shape[2] else mask

    with pytest.raises(ModelError, match="ALiBi mask that is not slope × column"):
        measure(lambda: Stepwise(window, cut=False), {20}, "X")
