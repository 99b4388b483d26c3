"""Calibrate a decoder: run it on windows of tokens layer by layer, measure, and make codes, in the memory of a layer.

Each linear runs once, after the codes of those before it are known (or with the original weights, if asked so). All
weights that read a value share the Hessian of that value and its factor, which are gone when their codes are made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from passopt.calibration.meter import Meter, flops_of_codes, flops_of_factor, flops_of_gram, flops_of_linear
from passopt.calibration.parts import PartMaker, Say, Settings
from passopt.calibration.pieces import WindowRunner, pieces_of
from passopt.calibration.rounding import Codes, dequantised
from passopt.calibration.spool import Spool
from passopt.calibration.stages import Stage, stages_of
from passopt.calibration.targets import Subject, Target
from passopt.calibration.tiles import TileRunner
from passopt.ir.atomic_folders import JOURNAL_NAME, keep_only, resumable_directory
from passopt.ir.calibration.entries import WeightEntry
from passopt.ir.calibration.keys import fingerprint
from passopt.ir.calibration.writer import CalibrationWriter
from passopt.ir.graph.decoder import INPUT_IDS
from passopt.ir.serialization.text import print_model
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.lazy_weight import LazyWeight
from passopt.ir.weights.sources import external_source
from passopt.verification.decoder_cut import Cut, Piece, extract

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: Increase this number when the same model and data start to give other bytes.
_ARITHMETIC = 1


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
            parts = PartMaker(writer, settings, marks, ids.shape, runner, meter, say)
            resumed = _Run(subject, ids, settings, writer, folder, parts, meter).run()
        shutil.rmtree(folder / _SCRATCH)
        keep_only(folder, {*(part["file"] for part in writer.finished), JOURNAL_NAME})
        writer.finish({"graph": graph, **model}, data)
    made = writer.finished
    return Report(
        {key: WeightEntry.from_json(body, key) for part in made for key, body in part["weights"].items()},
        [name for part in made for name in part["cache"]],
        [note for part in made for note in part["more"].get("notes", ())],
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
        parts: PartMaker,
        meter: Meter,
    ) -> None:
        self._subject = subject
        self._ids = ids
        self._settings = settings
        self._writer = writer
        self._folder = folder
        self._scratch = folder / _SCRATCH
        self._parts = parts
        self._meter = meter
        self._numbers = 0

    def run(self) -> int:
        """Run all pieces that are not finished, and return how many were."""
        asked = self._settings
        if not (asked.inputs or asked.cache or (asked.codes and asked.method == "gptq")):
            return self._run_weights()
        cut, pieces, reason = pieces_of(self._subject.graph)
        last = max(index for index, piece in enumerate(pieces) if self._is_needed(cut, piece))
        done = len(self._writer.finished)
        self._meter.begin(last + 1, done)
        if done > last:
            return done
        spool = Spool(self._scratch)
        hidden = _hidden(self._writer)
        if hidden is not None:
            path, shape = self._folder / hidden["file"], tuple(hidden["shape"])
            spool.adopt(hidden["value"], path, shape, np.dtype(hidden["dtype"]))
        windows = WindowRunner(self._ids, self._subject.graph, cut, asked.threads, self._scratch)
        for number in range(done, last + 1):
            piece = pieces[number]
            self._parts.begin(f"{number:03d}-{piece.name.replace(' ', '-')}")
            if reason and not number:
                self._parts.note(f"{reason}; the whole model runs at once, and takes the memory of all weights")
            self._run_piece(cut, piece, windows, spool, is_last=number == last)
            self._meter.end_piece()
        return done

    def _run_weights(self) -> int:
        """Make codes of the weights alone, one part per weight."""
        targets = [*self._subject.targets, *self._subject.tables]
        done = len(self._writer.finished)
        self._meter.begin(len(targets), done)
        for number, target in enumerate(targets[done:], done):
            self._parts.begin(f"{number:03d}-weight")
            self._parts.alone(target)
            self._parts.end({})
            self._meter.end_piece()
        return done

    def _is_needed(self, cut: Cut, piece: Piece) -> bool:
        """Return whether something is measured in a piece, or made of its weights."""
        if self._settings.cache and any(name.startswith("present.") for name in piece.targets):
            return True
        names = (*cut.shared, piece.carried) if piece.carried else cut.shared
        given = dict.fromkeys(names, np.zeros((1, 1, 1), np.float32))
        weights = cut.graph(piece, given).graph.initializers
        return any(target.name in weights for target in self._subject.targets)

    def _run_piece(self, cut: Cut, piece: Piece, windows: WindowRunner, spool: Spool, *, is_last: bool) -> None:
        """Run the stages of a piece, and write what was measured and made as a part."""
        given = dict(windows.shared)
        if piece.carried:
            given[piece.carried] = spool.get(piece.carried, 0)
        else:
            for table in self._subject.tables if self._settings.codes else ():
                self._parts.alone(table)
        present = {name for name in piece.targets if name.startswith("present.")} if self._settings.cache else set()
        result = {piece.result} - {""} if not is_last else set()
        varying = {INPUT_IDS, piece.carried}
        stages = stages_of(cut.graph(piece, given), varying, self._subject.targets, present | result)
        self._meter.plan(self._work(stages))
        changed: list[Target] = []
        work = 0.0
        for stage in stages:
            self._run_stage(cut, stage, windows, spool, given, work)
            for value, targets in stage.targets.items():
                found = self._parts.group(value, targets, spool)
                if self._settings.true_sequential:
                    changed += [self._replace(target, codes) for target, codes in found]
            made = [name for name in stage.values if name in present]
            for name in made:
                self._parts.measure_cache(name, spool)
            for name in (*stage.last_use, *made):
                if name in spool and name != piece.carried:
                    spool.drop(name)
            work = sum(flops_of_linear(target, self._ids.size) for group in stage.targets.values() for target in group)
        for target in changed:
            original = LazyWeight(target.weight.transpose().cast(DataType.FLOAT), target.name)
            self._subject.graph.graph.initializers[target.name].const_value = original
        self._hand_on(piece, spool, has_result=bool(result))

    def _run_stage(
        self, cut: Cut, stage: Stage, windows: WindowRunner, spool: Spool, given: dict[str, Array], work: float
    ) -> None:
        """Compute the values of a stage for all windows, and keep them."""
        if not stage.values:
            self._meter.add(work)
            return

        def take(window: int, outputs: dict[str, Array]) -> None:
            for name, array in outputs.items():
                spool.put(name, window, array)

        count = len(self._ids)
        graph = extract(cut.model, stage.values, given)
        windows.run(graph, spool, take, lambda done: self._meter.add(work * done / count))
        given.update((name, spool.get(name, 0)) for name in stage.values)

    def _replace(self, target: Target, codes: Codes) -> Target:
        """Let what runs from here on multiply with the numbers of the codes."""
        path = self._scratch / f"numbers-{self._numbers}.bin"
        self._numbers += 1
        turned = dequantised(codes)
        turned.tofile(path)
        source = external_source(path, target.name, DataType.FLOAT, turned.shape, 0)
        self._subject.graph.graph.initializers[target.name].const_value = LazyWeight(source, target.name)
        return target

    def _hand_on(self, piece: Piece, spool: Spool, *, has_result: bool) -> None:
        """Write the part, and keep the activations for the next piece on disk together with it."""
        more: dict[str, Any] = {}
        if has_result:
            path, shape, dtype = spool.file(piece.result)
            kept = path.rename(self._folder / f"{self._parts.name}.hidden")
            spool.adopt(piece.result, kept, shape, dtype)
            about = {"shape": list(shape), "dtype": dtype.str, "windows": len(self._ids)}
            more["hidden"] = {"value": piece.result, "file": kept.name, **about}
        self._parts.end(more)
        if piece.carried:
            spool.drop(piece.carried)
        for path in self._scratch.glob("numbers-*.bin"):
            path.unlink()

    def _work(self, stages: Sequence[Stage]) -> float:
        """Return about how much work a piece is."""
        total = 0.0
        for stage in stages:
            for targets in stage.targets.values():
                width = targets[0].weight.shape[1]
                total += sum(flops_of_linear(target, self._ids.size) for target in targets)
                if self._settings.codes and self._settings.method == "gptq":
                    total += flops_of_gram(width, self._ids.size) + flops_of_factor(width)
                total += sum(map(flops_of_codes, targets))
        return total
