"""Calibrate a decoder: run it on windows of tokens layer by layer, measure, and make codes, in the memory of a layer.

Each linear runs once, after the codes of those before it are known (or with the original weights, if asked so). All
weights that read a value share the Hessian of that value and its factor, which are gone when their codes are made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from passopt.calibration.codes import Order
from passopt.calibration.gram import Gram
from passopt.calibration.inputs import InputSummary
from passopt.calibration.inverse_factor import factor_inverse
from passopt.calibration.meter import Meter, flops_of_codes, flops_of_factor, flops_of_gram, flops_of_linear
from passopt.calibration.pieces import WindowRunner, pieces_of
from passopt.calibration.rounding import Codes, Method, Plan, dequantised, round_target
from passopt.calibration.spool import Spool
from passopt.calibration.stages import Stage, stages_of
from passopt.calibration.targets import Subject, Target
from passopt.calibration.tiles import TileRunner, tiles
from passopt.ir.atomic_folders import JOURNAL_NAME, keep_only, resumable_directory
from passopt.ir.calibration.entries import CacheEntry, CodesEntry, WeightEntry
from passopt.ir.calibration.keys import fingerprint
from passopt.ir.calibration.writer import CalibrationWriter
from passopt.ir.graph.decoder import INPUT_IDS
from passopt.ir.serialization.text import print_model
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.lazy_weight import LazyWeight
from passopt.ir.weights.sources import external_source
from passopt.verification.decoder_cut import Cut, Piece, extract

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Say: TypeAlias = Callable[[str], None]

#: Increase this number when the same model and data start to give other bytes.
_ARITHMETIC = 1


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
    """

    method: Method = "gptq"
    codes: bool = True
    inputs: bool = True
    cache: bool = True
    damp: float = 0.01
    act_order: bool = True
    true_sequential: bool = True
    threads: int = 1

    def identity(self) -> dict[str, Any]:
        """Return what decides the result."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "threads"}


@dataclasses.dataclass
class Report:
    """What a calibration did.

    Attributes:
        weights: The entries of all weights, by key.
        cache: The outputs of keys and values that were measured.
        notes: What was done otherwise than asked for, and why.
        resumed: The pieces that an earlier run had finished.
    """

    weights: dict[str, WeightEntry]
    cache: list[str]
    notes: list[str]
    resumed: int = 0


#: The folder inside of the unfinished output for what is needed for a while only.
_SCRATCH = "scratch"


def calibrate(
    subject: Subject,
    ids: Array,
    settings: Settings,
    output: Path,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    meter: Meter,
    say: Say,
) -> Report:
    """Write a calibration folder; an interrupted run goes on where it stopped, and gives the same bytes.

    Args:
        subject: The model.
        ids: The token ids [windows, length].
        settings: What to measure and make.
        output: The new folder.
        model: What the manifest says of the model, besides its identity.
        data: What it says of the data.
        meter: Is told what is done.
        say: Takes messages.

    Raises:
        UsageError: If the folder exists, or the disk is too small.
        ModelError: If the model cannot be run, or computes no numbers, or a weight cannot be read.
    """
    marks = {target.key: fingerprint(target.weight) for target in (*subject.targets, *subject.tables)}
    graph = hashlib.blake2b(print_model(subject.graph).encode(), digest_size=16).hexdigest()
    key = json.dumps([_ARITHMETIC, settings.identity(), dict(data), graph, marks], sort_keys=True)
    nbytes = sum(int(np.prod(target.weight.shape)) for target in (*subject.targets, *subject.tables))
    with resumable_directory(output, nbytes) as folder:
        writer = _opened(folder, hashlib.blake2b(key.encode(), digest_size=16).hexdigest())
        (folder / _SCRATCH).mkdir(exist_ok=True)
        with TileRunner(settings.threads) as runner:
            resumed = _Run(subject, ids, settings, writer, folder, marks, runner, meter, say).run()
        shutil.rmtree(folder / _SCRATCH)
        keep_only(folder, {*(part["file"] for part in writer.finished), JOURNAL_NAME})
        writer.finish({"graph": graph, **model}, data)
    parts = writer.finished
    return Report(
        {key: WeightEntry.from_json(body, key) for part in parts for key, body in part["weights"].items()},
        [name for part in parts for name in part["cache"]],
        [note for part in parts for note in part["more"].get("notes", ())],
        resumed,
    )


def _opened(folder: Path, key: str) -> CalibrationWriter:
    """Return the writer of a folder, without what an interrupted run left there and cannot be gone on with."""
    writer = CalibrationWriter(folder, key)
    hidden = _hidden(writer)
    names = {JOURNAL_NAME, *(part["file"] for part in writer.finished)}
    if hidden is not None:
        nbytes = hidden["windows"] * int(np.prod(hidden["shape"])) * np.dtype(hidden["dtype"]).itemsize
        path = folder / hidden["file"]
        if not path.is_file() or path.stat().st_size != nbytes:
            (folder / JOURNAL_NAME).unlink()
            return _opened(folder, key)
        names.add(hidden["file"])
    keep_only(folder, names)
    return writer


def _hidden(writer: CalibrationWriter) -> Mapping[str, Any] | None:
    """Return where the activations are that the last finished piece handed on."""
    found: Mapping[str, Any] | None = writer.finished[-1]["more"].get("hidden") if writer.finished else None
    return found


class _Run:
    """The state of a calibration."""

    def __init__(
        self,
        subject: Subject,
        ids: Array,
        settings: Settings,
        writer: CalibrationWriter,
        folder: Path,
        marks: Mapping[str, str],
        runner: TileRunner,
        meter: Meter,
        say: Say,
    ) -> None:
        self._subject = subject
        self._ids = ids
        self._settings = settings
        self._writer = writer
        self._folder = folder
        self._scratch = folder / _SCRATCH
        self._marks = marks
        self._runner = runner
        self._meter = meter
        self._say = say
        self._tensors: dict[str, Array] = {}
        self._weights: dict[str, WeightEntry] = {}
        self._cache: dict[str, CacheEntry] = {}
        self._notes: list[str] = []
        self._numbers = 0

    def run(self) -> int:
        """Run all pieces that are not finished, and return how many were."""
        if not self._needs_data():
            return self._run_weights()
        cut, pieces, reason = pieces_of(self._subject.graph)
        if reason:
            self._note(f"{reason}; the whole model runs at once, and needs the memory of all weights")
        last = max(index for index, piece in enumerate(pieces) if self._is_needed(cut, piece))
        pieces = pieces[: last + 1]
        done = len(self._writer.finished)
        self._meter.begin(len(pieces), done)
        if done >= len(pieces):
            return done
        spool = Spool(self._scratch)
        self._restore(spool)
        windows = WindowRunner(self._ids, self._subject.graph, cut, self._settings.threads, self._scratch)
        for number in range(done, len(pieces)):
            self._piece(cut, pieces[number], number, number == last, windows, spool)
            self._meter.end_piece()
        return done

    def _needs_data(self) -> bool:
        asked = self._settings
        return asked.inputs or asked.cache or (asked.codes and asked.method == "gptq")

    def _run_weights(self) -> int:
        """Make codes of the weights alone, one part per weight."""
        targets = [*self._subject.targets, *self._subject.tables]
        done = len(self._writer.finished)
        self._meter.begin(len(targets), done)
        for number, target in enumerate(targets[done:], done):
            name = f"weight-{number}"
            self._keep(target, name, None, self._codes_of(target, None), None)
            self._flush(name, {})
            self._meter.end_piece()
        return done

    def _is_needed(self, cut: Cut, piece: Piece) -> bool:
        """Return whether something is measured in a piece, or made of its weights."""
        if self._settings.cache and any(name.startswith("present.") for name in piece.targets):
            return True
        given = dict.fromkeys((piece.carried, *cut.shared), np.zeros((1, 1, 1), np.float32))
        graph = cut.graph(piece, given)
        names = {target.name for target in self._subject.targets}
        return any(name in names for name in graph.graph.initializers)

    def _restore(self, spool: Spool) -> None:
        """Take over the activations that the last finished piece handed on."""
        hidden = _hidden(self._writer)
        if hidden is not None:
            shape, dtype = tuple(hidden["shape"]), np.dtype(hidden["dtype"])
            spool.adopt(hidden["value"], self._folder / hidden["file"], shape, dtype)

    def _piece(self, cut: Cut, piece: Piece, number: int, is_last: bool, windows: WindowRunner, spool: Spool) -> None:
        part = f"{number:03d}-{piece.name.replace(' ', '-')}"
        varying = {INPUT_IDS, *([piece.carried] if piece.carried else [])}
        given = dict(windows.shared)
        if piece.carried:
            given[piece.carried] = spool.get(piece.carried, 0)
        wanted = {name for name in piece.targets if name.startswith("present.")} if self._settings.cache else set()
        wanted |= {piece.result} if piece.result and not is_last else set()
        whole = cut.graph(piece, given)
        stages = stages_of(whole, varying, self._subject.targets, wanted)
        self._meter.plan(self._flops(stages))
        changed: list[Target] = []
        before: list[Target] = []
        for stage in stages:
            self._run_stage(cut, stage, windows, spool, given, sum(map(self._flops_of_linear, before)))
            before = [target for group in stage.targets.values() for target in group]
            for value, targets in stage.targets.items():
                made = self._group(part, value, targets, spool)
                if self._settings.true_sequential:
                    changed += [self._replace(target, codes) for target, codes in made]
            self._measure_cache(part, stage, spool)
            for name in stage.last_use:
                if name in spool and name != piece.carried:
                    spool.drop(name)
        for target in changed:
            self._subject.graph.graph.initializers[target.name].const_value = _original(target)
        if number == 0:
            for table in self._subject.tables:
                if table.key not in self._weights and self._settings.codes:
                    self._keep(table, part, None, self._codes_of(table, None), None)
        self._hand_on(part, piece, spool, has_result=piece.result in wanted)

    def _run_stage(
        self,
        cut: Cut,
        stage: Stage,
        windows: WindowRunner,
        spool: Spool,
        given: dict[str, Array],
        work: float,
    ) -> None:
        """Compute the values of a stage for all windows, and keep them."""
        if not stage.values:
            self._meter.add(work)
            return
        graph = extract(cut.model, stage.values, given)

        def take(window: int, outputs: dict[str, Array]) -> None:
            for name, array in outputs.items():
                spool.put(name, window, array)

        count = len(self._ids)
        windows.run(graph, spool, take, lambda done: self._meter.add(work * done / count))
        given.update((name, spool.get(name, 0)) for name in stage.values)

    def _group(self, part: str, value: str, targets: Sequence[Target], spool: Spool) -> list[tuple[Target, Codes]]:
        """Measure a value, and make the codes of all weights that read it."""
        width = targets[0].weight.shape[1]
        named = f"the input of {targets[0].name}"
        summary = InputSummary(width) if self._settings.inputs else None
        is_gptq = self._settings.codes and self._settings.method == "gptq"
        gram = Gram(width, self._runner) if is_gptq else None
        for window in range(len(self._ids)):
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
            codes = self._codes_of(target, plan)
            self._meter.add(flops_of_codes(target))
            self._keep(target, part, summary, codes, plan, note)
            if codes is not None:
                found.append((target, codes))
        return found

    def _factor(self, gram: Gram, named: str) -> tuple[Plan, str]:
        """Return the factor of the inverse Hessian in the order of rounding, and what has to be said of it."""
        hessian = gram.hessian()
        rows, width = gram.count, len(hessian)
        order = Order.of(hessian.diagonal().copy(), by_activity=self._settings.act_order)
        if self._settings.act_order:
            ordered = np.empty_like(hessian)
            for part in tiles(width):
                ordered[part] = hessian[order.columns[part]][:, order.columns]
            hessian = ordered
            del ordered
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
            self._note(f"{named}: {note}")
        return Plan(factor, order), "; ".join(notes)

    def _codes_of(self, target: Target, plan: Plan | None) -> Codes | None:
        if not self._settings.codes:
            return None
        return round_target(target, self._method(plan), plan, self._runner)

    def _method(self, plan: Plan | None) -> Method:
        """Return the method by which codes are made: without inputs there is no Hessian, and they are rounded."""
        return "rtn" if plan is None and self._settings.method == "gptq" else self._settings.method

    def _keep(
        self,
        target: Target,
        part: str,
        summary: InputSummary | None,
        codes: Codes | None,
        plan: Plan | None,
        note: str = "",
    ) -> None:
        """Remember what was measured and made of a weight until the part is written."""
        if target.key in self._weights or any(target.key in item["weights"] for item in self._writer.finished):
            return  # a weight that several layers share is what the first of them says
        entries: tuple[CodesEntry, ...] = ()
        name = target.name
        if codes is not None:
            turn = (lambda array: np.ascontiguousarray(array.T)) if target.is_turned else (lambda array: array)
            self._tensors[f"{name}.codes"] = turn(codes.codes)
            self._tensors[f"{name}.scales"] = codes.scales
            entries = (
                CodesEntry(
                    f"{name}.codes",
                    f"{name}.scales",
                    1 if target.is_turned else 0,
                    method=self._method(plan),
                    damp=plan.factor.damp if plan is not None else 0.0,
                    dead=int(plan.factor.dead.sum()) if plan is not None else 0,
                    note=note,
                ),
            )
        absmax = ""
        if summary is not None:
            absmax = f"{name}.absmax"
            self._tensors[absmax] = summary.absmax
        rows = self._ids.size if summary is not None or plan is not None else 0
        shares = summary.percentiles() if summary is not None else {}
        self._weights[target.key] = WeightEntry(
            name, f"{part}.safetensors", self._marks[target.key], rows, absmax, shares, entries
        )

    def _replace(self, target: Target, codes: Codes) -> Target:
        """Let what runs from here on multiply with the numbers of the codes."""
        path = self._scratch / f"numbers-{self._numbers}.bin"
        self._numbers += 1
        dequantised(codes).tofile(path)
        source = external_source(path, target.name, DataType.FLOAT, target.weight.shape, 0)
        self._subject.graph.graph.initializers[target.name].const_value = LazyWeight(source, target.name)
        return target

    def _measure_cache(self, part: str, stage: Stage, spool: Spool) -> None:
        """Take the largest magnitudes of keys and values [1, heads, positions, width] over all positions."""
        for name in stage.values:
            if not name.startswith("present."):
                continue
            largest = None
            for window in range(len(self._ids)):
                found = np.abs(spool.get(name, window).astype(np.float32)).max(axis=(0, 2))
                largest = found if largest is None else np.maximum(largest, found)
            assert largest is not None
            self._tensors[name] = largest
            self._cache[name] = CacheEntry(f"{part}.safetensors", name, self._ids.size)
            spool.drop(name)

    def _hand_on(self, part: str, piece: Piece, spool: Spool, *, has_result: bool) -> None:
        """Write the part, and keep the activations for the next piece on disk together with it."""
        more: dict[str, Any] = {}
        if has_result:
            path, shape, dtype = spool.file(piece.result)
            file = f"{part}.hidden"
            path.rename(self._folder / file)
            more["hidden"] = {
                "value": piece.result,
                "file": file,
                "shape": list(shape),
                "dtype": dtype.str,
                "windows": len(self._ids),
            }
            spool.adopt(piece.result, self._folder / file, shape, dtype)
        self._flush(part, more)
        if piece.carried:
            spool.drop(piece.carried)
        for path in self._scratch.glob("numbers-*.bin"):
            path.unlink()

    def _flush(self, part: str, more: Mapping[str, Any]) -> None:
        self._writer.add(part, self._tensors, self._weights, self._cache, {**more, "notes": self._notes})
        self._tensors, self._weights, self._cache, self._notes = {}, {}, {}, []

    def _note(self, note: str) -> None:
        self._notes.append(note)
        self._say(note)

    def _flops_of_linear(self, target: Target) -> float:
        return flops_of_linear(target, self._ids.size)

    def _flops(self, stages: Sequence[Stage]) -> float:
        """Return about how much work a piece is."""
        total = 0.0
        for stage in stages:
            for targets in stage.targets.values():
                width = targets[0].weight.shape[1]
                total += sum(map(self._flops_of_linear, targets))
                if self._settings.codes and self._settings.method == "gptq":
                    total += flops_of_gram(width, self._ids.size) + flops_of_factor(width)
                total += sum(map(flops_of_codes, targets))
        return total


def _original(target: Target) -> LazyWeight:
    return LazyWeight(target.weight.cast(DataType.FLOAT), target.name)
