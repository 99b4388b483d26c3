"""Make what one part of a calibration folder holds: measure values on disk, and round the weights that read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from passopt.calibration.codes import Order
from passopt.calibration.gram import Gram
from passopt.calibration.inputs import InputSummary, column_absmax
from passopt.calibration.inverse_factor import factor_inverse
from passopt.calibration.meter import Meter, flops_of_codes, flops_of_factor, flops_of_gram
from passopt.calibration.rounding import Codes, Kind, Method, Plan, round_target
from passopt.calibration.spool import Spool
from passopt.calibration.targets import Target
from passopt.calibration.tiles import TileRunner, tiles
from passopt.ir.calibration.entries import CacheEntry, CodesEntry, WeightEntry
from passopt.ir.calibration.writer import CalibrationWriter

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Say: TypeAlias = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure and make.

    Attributes:
        method: How codes are made.
        codes: Make codes.
        inputs: Measure the inputs of linears.
        cache: Measure keys and values.
        damp: The damping of a Hessian, as a part of the mean of its diagonal.
        act_order: Round columns by falling activity.
        true_sequential: Let each linear see what the codes of those before it make.
        threads: The number of threads; it changes no bit.
        bits: The bits of a code, 8 or 4.
        group: The inputs that share a scale; 0 for all of an output channel.
    """

    method: Method = "gptq"
    codes: bool = True
    inputs: bool = True
    cache: bool = True
    damp: float = 0.02
    act_order: bool = True
    true_sequential: bool = True
    threads: int = 1
    bits: int = 8
    group: int = 0

    def identity(self) -> dict[str, Any]:
        """Return what decides the result."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "threads"}


class PartMaker:
    """Makes parts one after the other.

    Attributes:
        name: The name of the part that is being made.

    Args:
        writer: Writes them.
        settings: What to measure and make.
        marks: The fingerprints of the weights, by key.
        shape: The numbers of windows and of the tokens of each.
        runner: Runs tiles of matrices.
        meter: Is told what is done.
        say: Takes messages.
    """

    def __init__(
        self,
        writer: CalibrationWriter,
        settings: Settings,
        marks: Mapping[str, str],
        shape: tuple[int, ...],
        runner: TileRunner,
        meter: Meter,
        say: Say,
    ) -> None:
        self._writer = writer
        self._settings = settings
        self._marks = marks
        self._windows, self._length = shape
        self._runner = runner
        self._meter = meter
        self._say = say
        self.name = ""
        self._known = {key for part in writer.finished for key in part["weights"]}
        self.begin("")

    def begin(self, name: str) -> None:
        """Begin a part."""
        self.name = name
        self._tensors: dict[str, Array] = {}
        self._weights: dict[str, WeightEntry] = {}
        self._cache: dict[str, CacheEntry] = {}
        self._notes: list[str] = []

    def group(self, value: str, targets: Sequence[Target], spool: Spool) -> list[tuple[Target, Codes]]:
        """Measure a value, and make the codes of all weights that read it.

        Args:
            value: The name of the value.
            targets: The weights.
            spool: The values on disk.

        Returns:
            The weights that got codes, with these. One that an earlier part holds, as layers share it, gets none.

        Raises:
            ModelError: If the value or a weight holds NaN or infinity.
        """
        targets = [target for target in targets if target.key not in self._known]
        if not targets:
            return []
        width = targets[0].weight.shape[1]
        named = f"the input of {targets[0].name}"
        summary = InputSummary(width) if self._settings.inputs else None
        is_gptq = self._settings.codes and self._settings.method == "gptq"
        gram = Gram(width, self._runner) if is_gptq else None
        for window in range(self._windows):
            rows = spool.get(value, window).reshape(-1, width)
            if summary is not None:
                summary.add(rows, named)
            if gram is not None:
                gram.add(rows, named)
                self._meter.add(flops_of_gram(width, len(rows)))
        plan, note = None, ""
        if gram is not None:
            plan, note = self._factor(gram, named)
            self._meter.add(flops_of_factor(width))
        del gram
        found = []
        for target in targets:
            codes = self._keep(target, summary, plan, note)
            self._meter.add(flops_of_codes(target))
            if codes is not None:
                found.append((target, codes))
        return found

    def alone(self, target: Target) -> None:
        """Make the codes of a weight whose inputs are not looked at."""
        if target.key not in self._known:
            self._keep(target, None, None, "")

    def _factor(self, gram: Gram, named: str) -> tuple[Plan, str]:
        """Return the factor of the inverse Hessian in the order of rounding, and what has to be said of it."""
        hessian = gram.hessian()
        rows, width = gram.count, len(hessian)
        order = Order.of(hessian.diagonal().copy(), by_activity=self._settings.act_order)
        if self._settings.act_order:  # in place, since a second matrix would be most of the memory
            for part in tiles(width):
                hessian[part] = hessian[part][:, order.columns]
            for part in tiles(width):
                hessian[:, part] = hessian[:, part][order.columns]
        factor = factor_inverse(hessian, self._settings.damp, self._runner, named)
        notes = []
        if dead := int(factor.dead.sum()):
            notes.append(
                f"{dead} of {width} channels are 0 in all of the data; their weights are rounded to the nearest"
            )
        if rows < width:
            notes.append(f"{rows} tokens are fewer than its {width} channels: use more, or the codes rest on damping")
        if factor.damp > self._settings.damp:
            notes.append(f"its Hessian needed the damping {factor.damp:g}")
        for note in notes:
            self.note(f"{named}: {note}")
        return Plan(factor, order), "; ".join(notes)

    def _method(self, plan: Plan | None) -> Method:
        """Return the method by which codes are made: without inputs there is no Hessian, and they are rounded."""
        return "rtn" if plan is None and self._settings.method == "gptq" else self._settings.method

    def _keep(self, target: Target, summary: InputSummary | None, plan: Plan | None, note: str) -> Codes | None:
        """Make the codes of a weight if they are wanted, and remember them, and what was measured, for the part."""
        codes = self._round(target, plan, note) if self._settings.codes else None
        entries = () if codes is None else (codes[1],)
        name = target.name
        absmax = of_weight = ""
        if summary is not None:
            absmax, of_weight = f"{name}.absmax", f"{name}.weight_absmax"
            self._tensors[absmax] = summary.absmax
            self._tensors[of_weight] = column_absmax(target.weight)
        rows = self._windows * self._length if summary is not None or plan is not None else 0
        shares = summary.percentiles() if summary is not None else {}
        self._weights[target.key] = WeightEntry(
            name, f"{self.name}.safetensors", self._marks[target.key], rows, absmax, shares, entries, of_weight
        )
        self._known.add(target.key)
        return None if codes is None else codes[0]

    def _round(self, target: Target, plan: Plan | None, note: str) -> tuple[Codes, CodesEntry]:
        """Return the codes of a weight, and their entry; they are stored in the layout of the weight."""
        method, name = self._method(plan), target.name
        kind = Kind(self._settings.bits, self._settings.group)
        codes = round_target(target, method, plan, self._runner, kind)
        is_turned = target.is_turned
        self._tensors[f"{name}.codes"] = np.ascontiguousarray(codes.codes.T) if is_turned else codes.codes
        self._tensors[f"{name}.scales"] = codes.scales
        entry = CodesEntry(
            f"{name}.codes", f"{name}.scales", int(is_turned), kind.bits, kind.group, method=method, note=note
        )
        if plan is not None:
            entry = dataclasses.replace(entry, damp=plan.factor.damp, dead=int(plan.factor.dead.sum()))
        return codes, entry

    def measure_cache(self, name: str, spool: Spool) -> None:
        """Take the largest magnitudes of keys or values [1, heads, positions, width] over all positions."""
        largest: Array = np.zeros((), np.float32)
        for window in range(self._windows):
            found = np.abs(spool.get(name, window).astype(np.float32)).max(axis=(0, 2))
            largest = np.maximum(largest, found)
        self._tensors[name] = largest
        self._cache[name] = CacheEntry(f"{self.name}.safetensors", name, self._windows * self._length)

    def end(self, more: Mapping[str, Any]) -> None:
        """Write the part; `more` is what a run that goes on needs to know."""
        self._writer.add(self.name, self._tensors, self._weights, self._cache, {**more, "notes": self._notes})

    def note(self, note: str) -> None:
        """Say what was done otherwise than asked for, and why, and keep it in the part."""
        self._notes.append(note)
        self._say(note)
