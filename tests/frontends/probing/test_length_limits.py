"""Branches of code on lengths, and the number of positions up to which a trace of it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from passopt.frontends.probing.length_limits import Conditions, probe
from passopt.ir.errors import ModelError


class Toy(torch.nn.Module):
    """A step of one layer whose code is a function of the tensors."""

    def __init__(self, code: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(5, device="meta"), requires_grad=False)
        self.code = code

    def forward(self, input_ids: Any, attention_mask: Any, past: Any, position_ids: Any = None) -> Any:
        key = past[0][0] if past else torch.zeros(input_ids.shape[0], 2, 0, 4)
        states = torch.cat([key, self.weight[0] * input_ids[:, None, :, None].expand(-1, 2, -1, 4)], 2)
        return self.code(input_ids, attention_mask, states)


def conditions(code: Callable[..., Any], phase: str = "merged") -> Conditions:
    seq, past = {"merged": (7, 3), "prefill": (7, 0), "decode": (1, 3)}[phase]
    cache = torch.zeros(2, 2, past, 4)
    arguments = {
        "input_ids": torch.ones(2, seq, dtype=torch.long),
        "attention_mask": torch.ones(2, past + seq, dtype=torch.long),
        "past": ((cache, cache.clone()),) if past else (),
    }
    return probe(Toy(code), arguments, phase)


def plain(ids: Any, mask: Any, states: Any) -> Any:
    return states * mask[:, None, :, None]


def scaled_beyond(limit: int, measure: Callable[..., int]) -> Callable[..., Any]:
    def code(ids: Any, mask: Any, states: Any) -> Any:
        return 2 * plain(ids, mask, states) if measure(ids, states) > limit else plain(ids, mask, states)

    return code


@pytest.mark.parametrize("phase", ["merged", "prefill", "decode"])
@pytest.mark.parametrize("positions", [None, 4096])
def test_code_without_branches_has_no_limit(phase: str, positions: int | None) -> None:
    assert conditions(plain, phase).limit(phase, positions, "X") is None


def test_an_operator_whose_shape_torch_finds_by_others_is_followed() -> None:
    """As in BLOOM's attention: the bias of a baddbmm is expanded to sizes that are symbols."""

    def code(ids: Any, mask: Any, states: Any) -> Any:
        keys = states[:, 0]
        return torch.baddbmm(mask[:, None].to(keys.dtype), keys, keys.transpose(1, 2))

    assert conditions(code).limit("merged", None, "X") is None


@pytest.mark.parametrize("phase", ["merged", "prefill", "decode"])
@pytest.mark.parametrize("limit", [32, 100, 4095])
def test_a_branch_on_the_columns_is_a_limit(phase: str, limit: int) -> None:
    found = conditions(scaled_beyond(limit, lambda ids, states: states.shape[2]), phase)
    assert found.limit(phase, limit, "X") == limit
    assert found.limit(phase, None, "X") == limit


@pytest.mark.parametrize("phase", ["merged", "prefill", "decode"])
def test_a_branch_below_the_positions_is_refused(phase: str) -> None:
    found = conditions(scaled_beyond(32, lambda ids, states: states.shape[2]), phase)
    with pytest.raises(
        ModelError, match=r"X takes another branch where not .* <= 32.*test_length_limits.*34 positions"
    ):
        found.limit(phase, 34, "X")


@pytest.mark.parametrize("phase", ["merged", "prefill", "decode"])
def test_a_branch_at_the_last_position_only_leaves_that_one_out(phase: str) -> None:
    """As in MPT, whose bias begins at max(0, positions - length): nobody can know that both branches agree there."""

    def code(ids: Any, mask: Any, states: Any) -> Any:
        first = max(0, 64 - states.shape[2])
        return torch.zeros(64, dtype=torch.float32)[first:].sum() + states[:, 0].sum()

    found = conditions(code, phase)
    assert found.limit(phase, 64, "X") == 63
    with pytest.raises(ModelError, match=r"X takes another branch"):
        found.limit(phase, 65, "X")


@pytest.mark.parametrize(
    ("measure", "says"),
    [
        (lambda ids, states: ids.shape[1], "seq <= 40"),
        (lambda ids, states: states.shape[2] - ids.shape[1], "past <= 40"),
        (lambda ids, states: 20 * ids.shape[0], "batch = 2|batch <= 2"),
        (lambda ids, states: ids.shape[0] * states.shape[2], "batch"),
        (lambda ids, states: 41 - states.shape[2] if states.shape[2] % 2 else 0, "Mod|%"),
    ],
)
def test_any_length_may_be_branched_on(measure: Callable[..., int], says: str) -> None:
    with pytest.raises(ModelError, match=rf"another branch where not .*({says})"):
        conditions(scaled_beyond(40, measure)).limit("merged", 64, "X")


def test_a_branch_that_begins_later_ends_where_it_was_seen_to_hold() -> None:
    """Tokens of one step beyond 64: then so many columns are right for every split into past and new ones."""
    found = conditions(scaled_beyond(64, lambda ids, states: ids.shape[1]))
    assert found.limit("merged", None, "X") == 66


def test_code_for_equal_lengths_only_is_refused() -> None:
    def square(ids: Any, mask: Any, states: Any) -> Any:
        return ids @ ids

    with pytest.raises(ModelError, match="X has code that torch traces for batch = seq only|another branch"):
        conditions(square_or_plain(square)).limit("merged", None, "X")


def square_or_plain(square: Callable[..., Any]) -> Callable[..., Any]:
    """Torch refuses a product of a sample with unequal lengths, so branch on it."""

    def code(ids: Any, mask: Any, states: Any) -> Any:
        return square(ids, mask, states) if ids.shape[0] == ids.shape[1] else plain(ids, mask, states)

    return code


def test_a_branch_on_numbers_in_tensors_is_an_error_of_torch() -> None:
    def code(ids: Any, mask: Any, states: Any) -> Any:
        return states if mask.max() > 3 else 2 * states

    with pytest.raises(Exception, match="data-dependent|local_scalar_dense"):
        conditions(code)
