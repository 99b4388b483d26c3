"""Calibrate a model on data: `passopt.calibrate`."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from passopt.api import checked
from passopt.api.model import Model, ModelLike, changeable, refuse_existing
from passopt.calibration.calibrate import Report
from passopt.calibration.calibrate import calibrate as calibrate_graph
from passopt.calibration.data import read_data
from passopt.calibration.meter import Meter
from passopt.calibration.parts import Settings
from passopt.calibration.rounding import LARGEST, METHODS
from passopt.calibration.targets import subject_of
from passopt.ir.errors import UsageError
from passopt.ir.graph.decoder import decoder_of
from passopt.passes.pipeline.as_pipeline import PassesLike, as_pipeline
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.precision.group_fit import GROUPS
from passopt.reporting.reporter import SILENT, Bar, Reporter
from passopt.reporting.result import Result

#: What can be collected.
COLLECTED = ("inputs", "cache", "codes")


@dataclasses.dataclass(frozen=True, repr=False)
class CalibrateResult(Result):
    """The result of a calibration.

    Attributes:
        output: The folder that was written.
        method: How codes were made; "" if none were.
        data: What the model was calibrated on: digest, nsamples, seqlen, seed and sets; empty if no data was needed.
        report: What was measured and made.
        seconds: How long it took.
    """

    output: Path
    method: str
    data: dict[str, Any]
    report: Report
    seconds: float

    def to_text(self) -> str:
        weights = self.report.weights.values()
        measured = sum(bool(entry.absmax) for entry in weights)
        made = sum(bool(entry.codes) for entry in weights)
        lines = []
        if self.data:
            tokens = self.data["nsamples"] * self.data["seqlen"]
            count, length = self.data["nsamples"], self.data["seqlen"]
            lines.append(f"{tokens:,} tokens in {count} windows of {length}, digest {self.data['digest'][:12]}")
        if made:
            lines.append(f"{made} weights have codes by {self.method}")
        if measured:
            lines.append(f"the inputs of {measured} weights were measured")
        if self.report.cache:
            lines.append(f"{len(self.report.cache)} keys and values were measured")
        if self.report.resumed:
            lines.append(f"{self.report.resumed} pieces were those of an interrupted run")
        return "\n".join([*lines, f"→ {self.output}"])

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "method": self.method,
            "data": self.data,
            "weights": {key: entry.to_json() for key, entry in self.report.weights.items()},
            "cache": self.report.cache,
            "notes": self.report.notes,
            "resumed": self.report.resumed,
            "seconds": round(self.seconds, 3),
        }


def calibrate(
    model: ModelLike,
    output: Path | str,
    *,
    data: str | Sequence[str] = (),
    passes: PassesLike | None = None,
    collect: str | Sequence[str] = COLLECTED,
    method: Literal["gptq", "rtn", "mse"] = "gptq",
    bits: Literal[8, 4] = 8,
    group: int = 0,
    tokenizer: Path | str | None = None,
    nsamples: int = 32,
    seqlen: int | None = None,
    seed: int = 0,
    damp: float = 0.02,
    act_order: bool = True,
    true_sequential: bool = True,
    embedding: bool = False,
    head: bool = False,
    threads: int | None = None,
    reporter: Reporter = SILENT,
) -> CalibrateResult:
    """Run a decoder on calibration data, one layer at a time, and write what was measured and codes made of it.

    `int8{from=OUTPUT}` quantises with these codes. Only a layer is in memory; activations lie on disk. If it is
    interrupted, the same call goes on after the last finished layer, and gives the same bytes.

    Args:
        model: A model, or its path.
        output: The new folder.
        data: Calibration sets from local files, such as `"c4:c4-train.00000-of-01024.json.gz*2"`: a format (c4, ceval,
            alpaca, text, messages), which may be left out, the file, and a weight.
        passes: The passes to run before; those that stand before `int8` when it takes the codes.
        collect: What to collect: "inputs", "cache" and "codes".
        method: How codes are made: "gptq", "rtn" (to the nearest) or "mse" (scales of least squared error).
        bits: The bits of a code: 8 for `int8{from=OUTPUT}`, 4 for `int4{from=OUTPUT}`.
        group: The inputs that share a scale, with 4 bits: 128, 64 or 32; 0 with 8 bits.
        tokenizer: A folder, tokenizer.json or tokenizer.model; None for the one beside the model.
        nsamples: The number of windows of tokens.
        seqlen: The tokens of a window; None for 512, or what the model takes if that is less.
        seed: Decides which windows are chosen from the sets.
        damp: The damping of GPTQ, as a part of the mean of the Hessian's diagonal.
        act_order: Round the columns of a weight by falling activity.
        true_sequential: Let every linear see what the codes of those before it make, and not the original weights.
        embedding: Make codes of the embedding, too; they are rounded to the nearest.
        head: Make codes of the head, too.
        threads: The number of threads; None for one per core. It changes no bit of the result.
        reporter: Is told about progress and fallbacks.

    Returns:
        What was measured and made.

    Raises:
        UsageError: The folder exists, or an option or a set is wrong.
        ModelError: The model, the tokenizer or the data cannot be read or do not fit, or there is too little data.
        PassError: A pass cannot work on this model.

    Example:
        >>> passopt.calibrate("baichuan2", "calib", data=["c4:c4.json.gz*2", "ceval:ceval-exam.zip"])
        >>> passopt.run("baichuan2", "baichuan2,int8{from=calib}", "quantised")
    """
    start = time.monotonic()
    asked = _collected(collect)
    checked.one_of("method", method, METHODS)
    _check_kind(bits, group, embedding)
    for name, number in (("nsamples", nsamples), ("seqlen", seqlen), ("threads", threads)):
        checked.whole(name, number, 1)
    checked.whole("seed", seed, 0)
    checked.tolerance("damp", damp)
    folder = checked.path("output", output)
    refuse_existing(folder)
    sets = list(checked.texts("data", data))
    found = changeable(model)
    settings = Settings(
        method=method,
        codes="codes" in asked,
        inputs="inputs" in asked and bool(sets),
        cache="cache" in asked and bool(sets),
        damp=float(damp),
        act_order=act_order,
        true_sequential=true_sequential,
        threads=threads or os.cpu_count() or 1,
        bits=bits,
        group=group,
    )
    if not sets and (not settings.codes or method == "gptq"):
        raise UsageError(
            "`data`: name at least one calibration set, such as c4:c4-train.00000-of-01024.json.gz; only codes by "
            "`method=rtn` and `method=mse` need none"
        )
    pipeline = as_pipeline(passes) if passes else None
    if pipeline is not None:
        run_passes(found.ir, pipeline.passes)
    decoder_of(found.ir)
    chosen = None
    if sets:
        words = Path(tokenizer) if tokenizer is not None else _beside(found)
        chosen = read_data(sets, words, found.ir, count=nsamples, length=seqlen, seed=seed)
    subject = subject_of(found.ir, embedding=embedding, head=head)
    cut = next((item for item in subject.targets if group and item.weight.shape[1] % group), None)
    if cut is not None and settings.codes:
        raise UsageError(
            f"`group`: groups of {group} do not fill the {cut.weight.shape[1]} inputs of {cut.name}; choose another of "
            f"{', '.join(map(str, GROUPS))}, or 8 bits"
        )
    bars = _Bars(reporter)
    try:
        report = calibrate_graph(
            subject,
            chosen.ids if chosen is not None else np.zeros((1, 1), np.int64),
            settings,
            folder,
            {"passes": pipeline.text if pipeline is not None else "", **settings.identity()},
            chosen.identity if chosen is not None else {},
            Meter(bars.open),
            reporter.say,
        )
    finally:
        bars.close()
    identity = chosen.identity if chosen is not None else {}
    return CalibrateResult(folder, method if settings.codes else "", identity, report, time.monotonic() - start)


def _check_kind(bits: int, group: int, embedding: bool) -> None:
    """Raise UsageError unless there is a pass for codes of so many bits in such groups."""
    if bits not in LARGEST:
        raise UsageError(f"`bits` is 8 or 4, not {bits!r}")
    if bits == 4 and group not in GROUPS:
        raise UsageError(f"`group`: codes of 4 bits need groups of {', '.join(map(str, GROUPS))} inputs, not {group}")
    if bits == 8 and group:
        raise UsageError("`group`: codes of 8 bits have a scale per output channel; leave it out, or set `bits=4`")
    if bits == 4 and embedding:
        raise UsageError(
            "`embedding`: a table of 4 bits would be dequantised whole at every step; leave it out, and quantise the "
            "embedding to 8 bits behind int4: quantize-weights{embedding=true}"
        )


def _collected(collect: str | Sequence[str]) -> set[str]:
    listed = collect.split(",") if isinstance(collect, str) else checked.texts("collect", collect)
    for item in listed:
        checked.one_of("collect", item, COLLECTED)
    if not listed:
        raise UsageError(f"`collect`: name some of {', '.join(COLLECTED)}")
    return set(listed)


def _beside(model: Model) -> Path:
    if model.path is None:
        raise UsageError("a model in memory has no tokenizer beside it; name one (`tokenizer`)")
    return model.path.parent


class _Bars:
    """A progress bar that opens when it is known how much there is to do."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._bar: Bar | None = None

    def open(self, total: int, done: int) -> Callable[[int], None]:
        self._bar = self._reporter.bar("calibrating", total, in_items=True)
        if done:
            getattr(self._bar, "skip", self._bar)(done)
        return self._bar

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
