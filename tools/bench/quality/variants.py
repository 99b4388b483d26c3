"""List the ways of quantising that are measured, and what each must hold against another one."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way of quantising.

    Attributes:
        name: What the table calls it.
        passes: The pipeline over the fused model; `CODES…` and `INPUTS` stand for the calibrations of these names.
        cache: The KV cache is in 8 bits, of which the weights' bytes say nothing.
    """

    name: str
    passes: str
    cache: bool = False


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A call of `passopt calibrate`: the passes before, and further options."""

    passes: str = ""
    options: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Goal:
    """The mean divergence of a variant may be at most `factor` times that of another one, or `most` in all."""

    variant: str
    most: float
    than: str = ""


_SMOOTH = "smooth{from=INPUTS}"
_BOTH = "rotate,smooth{targets=down,from=ROTATED}"

CALIBRATIONS = {
    "SQUARES": Calibration(options=("--collect", "codes", "--method", "mse")),
    "INPUTS": Calibration(options=("--collect", "inputs")),
    "ROTATED": Calibration("rotate", ("--collect", "inputs")),
    "CODES": Calibration(options=("--collect", "codes", "--damp", "0.01")),
    "SMOOTHED": Calibration(_SMOOTH, ("--collect", "codes", "--damp", "0.01")),
    "CODES4": Calibration(options=("--collect", "codes", "--damp", "0.01", "--bits", "4", "--group", "64")),
}

VARIANTS = (
    Variant("int8 weights, rounded", "int8"),
    Variant("int8 weights, least squares", "int8{from=SQUARES}"),
    Variant("int8 weights, GPTQ", "int8{from=CODES}"),
    Variant("W8A8", "int8{activations=dynamic}"),
    Variant("W8A8, smoothed", f"{_SMOOTH},int8{{activations=dynamic}}"),
    Variant("W8A8, smoothed, GPTQ", f"{_SMOOTH},int8{{activations=dynamic,from=SMOOTHED}}"),
    Variant("W8A8, rotated (no data)", "rotate,int8{activations=dynamic}"),
    Variant("W8A8, rotated and smoothed", f"{_BOTH},int8{{activations=dynamic}}"),
    Variant("int8 cache, keys per token", "int8-cache{keys=token}", cache=True),
    Variant("int8 cache", "int8-cache", cache=True),
    Variant("int4 weights, groups of 64, rounded", "int4{group=64}"),
    Variant("int4 weights, groups of 64, GPTQ", "int4{group=64,method=gptq,from=CODES4}"),
)

GOALS = (
    Goal("int8 weights, GPTQ", 0.4, "int8 weights, rounded"),
    Goal("W8A8, smoothed", 0.45, "W8A8"),
    Goal("W8A8, rotated (no data)", 0.45, "W8A8"),
    Goal("W8A8, rotated and smoothed", 0.33, "W8A8"),
    Goal("int8 cache", 0.0005),
    Goal("int4 weights, groups of 64, GPTQ", 0.5, "int4 weights, groups of 64, rounded"),
)
