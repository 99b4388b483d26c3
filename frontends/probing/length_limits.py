"""Find the lengths at which a traced graph holds: the code may branch on a length, and a graph has one branch only.

torch records every decision about a length as a condition on the symbols of the shapes. The conditions are evaluated at
many legal lengths. torch takes each length to be 2 or more while it traces; lengths of 0 and 1 are for the self-check.
"""

from __future__ import annotations

import dataclasses
import itertools
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from passopt.frontends.probing.weightless import fake_weights
from passopt.ir.errors import ModelError

_BATCH, _SEQ, _PAST, _TOTAL = "batch", "seq", "past", "past+seq"
_TORCH = Path(torch.__file__).parent
#: The number of columns that a graph must hold for if the configuration names no number of positions.
_LEAST = 16
#: The lengths beyond which nothing is looked at, and the batches that are looked at.
_FARTHEST = 1 << 20
_BATCHES = (2, 3, 5, 17, 128)

#: The sizes of one call by name.
Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What a trace assumes of its lengths.

    Attributes:
        expected: What torch made of each dimension of each input, and the name of its size.
        guards: The conditions that must hold, over the same symbols, and the lines of code that made them.
    """

    expected: Sequence[tuple[Any, str]]
    guards: Sequence[tuple[Any, str]]

    def limit(self, phase: str, positions: int | None, subject: str) -> int | None:
        """Return the largest number of columns (past and new ones) for which the trace is known to hold.

        That may be one less than the model has by its configuration. The result is None if nothing limits it.
        `positions` are those that the model has by its configuration, and `subject` begins a message.

        Raises:
            ModelError: If the trace does not hold for all lengths up to `positions`.
        """
        symbols = self._symbols(subject)
        good = 0
        for total, calls in itertools.groupby(_calls(phase, self._numbers(), positions), lambda call: call[_TOTAL]):
            for sizes in calls:
                broken = self._broken(symbols, sizes)
                if broken is None:
                    continue
                # The last position may be a border that changes nothing, as of max(0, positions - length). Whether it
                # does is not known, so it is left out, which the model says.
                if good < (positions or _LEAST) - 1:
                    raise ModelError(f"{subject} {_refusal(broken, sizes, positions)}")
                return good
            good = total
        return None

    def _symbols(self, subject: str) -> dict[Any, str]:
        """Return the name of the size that each symbol stands for.

        Raises:
            ModelError: If one symbol stands for two sizes: the code is right only where these are equal.
        """
        names: dict[Any, str] = {}
        for expression, name in self.expected:
            if expression.is_Symbol and names.setdefault(expression, name) != name:
                raise ModelError(
                    f"{subject} has code that torch traces for {names[expression]} = {name} only; a graph must hold "
                    f"for all lengths"
                )
        return names

    def _numbers(self) -> set[int]:
        """Return the numbers in the conditions: where a branch begins, lengths around them are looked at."""
        found = (atom for guard, _ in self.guards for atom in guard.atoms(sympy.Integer))
        return {abs(int(number)) for number in found}

    def _broken(self, symbols: Mapping[Any, str], sizes: Sizes) -> tuple[str, str] | None:
        """Return the first condition that does not hold for these sizes, in words, and where it was made; or None."""
        values = {symbol: sympy.Integer(sizes[name]) for symbol, name in symbols.items()}
        for expression, name in self.expected:
            if expression.xreplace(values) != sizes[name]:
                return f"{name} = {_named(expression, symbols)}", ""
        for guard, place in self.guards:
            if guard.xreplace(values) != sympy.true:
                return _named(guard, symbols), place
        return None


def conditions(env: ShapeEnv, inputs: Mapping[str, Any], phase: str) -> Conditions:
    """Return the conditions that torch recorded in `env`; `inputs` are the fake tensors of a step by name."""
    expected = []
    for name, value in inputs.items():
        axes = _axes(name, phase)
        for axis, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and axis in axes:
                expected.append((env.replace(size.node.expr), axes[axis]))
    guards: dict[Any, str] = {}
    for guard in env.guards:
        expression = env.replace(guard.expr)
        if expression != sympy.true and not _is_layout(guard, expression):
            guards.setdefault(expression, _place(guard))
    return Conditions(expected, list(guards.items()))


def _is_layout(guard: Any, expression: Any) -> bool:
    """Return whether torch itself asked if two lengths are equal, for strides and shortcuts that no graph has."""
    frame = getattr(guard.sloc, "framework_loc", None)
    own = isinstance(frame, traceback.FrameSummary) and _TORCH in Path(frame.filename).parents
    return own and isinstance(expression, sympy.Ne)


def _place(guard: Any) -> str:
    """Return the file and line of the code that made a condition, or nothing if torch did not keep it."""
    frame = getattr(guard.sloc, "framework_loc", None)
    return f"{Path(frame.filename).name}:{frame.lineno}" if isinstance(frame, traceback.FrameSummary) else ""


def probe(step: Any, arguments: Mapping[str, Any], phase: str) -> Conditions:
    """Return the conditions under which the code of a step computes what it computes for sample arguments.

    The step runs once on tensors without data, whose lengths are symbols.

    Raises:
        Exception: Whatever torch or the stock code raises, as for branches on the values of tensors.
    """
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    fake_weights(step, mode)
    past = {f"past_{n}": state for n, state in enumerate(state for layer in arguments["past"] for state in layer)}
    plain = {name: value for name, value in arguments.items() if name != "past"}
    inputs = {name: _symbolic(mode, name, value, phase) for name, value in (plain | past).items()}
    states = [inputs[name] for name in past]
    given = {name: inputs[name] for name in plain} | {"past": tuple(zip(states[::2], states[1::2], strict=True))}
    # Without the dispatcher in Python, an operator within torch's own shape functions takes no symbols (baddbmm).
    with torch.no_grad(), enable_python_dispatcher(), mode:
        step(**given)
    return conditions(env, inputs, phase)


def _symbolic(mode: FakeTensorMode, name: str, value: torch.Tensor, phase: str) -> Any:
    axes = _axes(name, phase)
    sizes = [DimDynamic.DYNAMIC if axis in axes else DimDynamic.STATIC for axis in range(value.ndim)]
    return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


def _axes(name: str, phase: str) -> dict[int, str]:
    """Return the names of the free sizes of an input, by axis."""
    if name.startswith("past"):
        return {0: _BATCH, 2: _PAST}
    if name == "attention_mask":
        return {0: _BATCH, 1: _SEQ if phase == "prefill" else _TOTAL}
    return {0: _BATCH} if phase == "decode" else {0: _BATCH, 1: _SEQ}


def _calls(phase: str, numbers: set[int], positions: int | None) -> Iterator[Sizes]:
    """Yield calls of growing length."""
    marks = {*numbers, *(1 << power for power in range(21)), *([positions, 2 * positions] if positions else [])}
    around = {mark + shift for mark, shift in itertools.product(marks, range(-3, 4))}
    for total in sorted(total for total in around if 4 <= total <= _FARTHEST):
        splits = {"prefill": [total], "decode": [1]}.get(phase, [2, 3, total // 2, total - 2])
        for seq in splits:
            for batch in _BATCHES if total < 2 * _BATCHES[2] else _BATCHES[:1]:
                yield {_BATCH: batch, _SEQ: seq, _PAST: total - seq, _TOTAL: total}


def _named(expression: Any, symbols: Mapping[Any, str]) -> str:
    return str(expression.xreplace({symbol: sympy.Symbol(name) for symbol, name in symbols.items()}))


def _refusal(broken: tuple[str, str], sizes: Sizes, positions: int | None) -> str:
    rule, place = broken
    where = f" ({place})" if place else ""
    call = ", ".join(f"{name} {size}" for name, size in sizes.items() if name != _TOTAL)
    known = f"The model has {positions} positions by config.json: " if positions else ""
    return (
        f"takes another branch where not {rule}{where}, such as at {call}, and a graph has one branch for all "
        f"lengths. {known}Set fewer positions there, so that the rule holds for all of them, or export code without "
        f"this branch."
    )
