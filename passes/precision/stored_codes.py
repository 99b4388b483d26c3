"""Find the codes that a calibration folder holds for a weight, under all that passes have done to the weight since."""

from __future__ import annotations

from passopt.ir.calibration.calibration import Calibration
from passopt.ir.calibration.keys import weight_key
from passopt.ir.errors import CalibrationError
from passopt.ir.weights.dequantized import Known, mapped_codes
from passopt.ir.weights.expressions import Cast, Expression, Transpose


def stored_codes(weight: Expression, axis: int, calibration: Calibration, who: str) -> tuple[Expression, Expression]:
    """Return codes and scales of a weight, with a scale per index of an axis, from a calibration folder.

    Shards, zero padding, slices, transpositions and casts of a calibrated weight become those of its codes and scales,
    so that codes are equal at every degree, and in any order of the passes.

    Args:
        weight: The weight.
        axis: The axis of the output channels.
        calibration: The folder.
        who: The pass that asks, for messages.

    Raises:
        CalibrationError: If the folder holds no codes of the weight, or was made of another model.
    """
    found = mapped_codes(weight, axis, 0, _known(calibration, who, bits=8))
    if found is None:
        raise calibration.unknown(weight, who)
    codes, scales = found
    return codes, scales.cast(weight.dtype)


def holds_codes(weight: Expression, calibration: Calibration) -> bool:
    """Return whether a calibration folder holds codes of a weight, or of what it is a part of."""
    return any(calibration.codes(part.text()) is not None for part in weight.walk())


def stored_groups(weight: Expression, group: int, calibration: Calibration, who: str) -> tuple[Expression, Expression]:
    """Return codes (int8 within ±7) and scales [out, groups] of a weight [out, in] from a calibration folder.

    Args:
        weight: The weight.
        group: The inputs that share a scale.
        calibration: The folder.
        who: The pass that asks, for messages.

    Raises:
        CalibrationError: If the folder holds no such codes of the weight, or was made of another model.
        ModelError: If a group would be cut.
    """
    found = mapped_codes(weight, 0, group, _known(calibration, who, bits=4, group=group))
    if found is None:
        raise calibration.unknown(weight, who)
    codes, scales = found
    return codes, scales.cast(weight.dtype)


def _known(calibration: Calibration, who: str, bits: int, group: int = 0) -> Known:
    """Return the function that looks a weight up in a calibration folder."""

    def known(weight: Expression, axis: int) -> tuple[Expression, Expression] | None:
        is_there = weight_key(weight) in calibration.weights and not isinstance(weight, (Cast, Transpose))
        return _of_base(weight, axis, calibration, who, bits, group) if is_there else None

    return known


def _of_base(
    weight: Expression, axis: int, calibration: Calibration, who: str, bits: int, group: int
) -> tuple[Expression, Expression]:
    """Return the codes of a weight that the folder knows by itself."""
    found = calibration.codes(weight_key(weight), bits=bits, group=group)
    others = [f"{item.bits} bits" for item in calibration.weights[weight_key(weight)].codes]
    if found is None and others:
        of_groups = f" in groups of {group}" if group else ""
        wanted = f"--bits {bits}" + (f" --group {group}" if group else "")
        raise CalibrationError(
            f"{who}: {calibration.folder} holds codes of {', '.join(others)} of {weight_key(weight)}, expected {bits} "
            f"bits{of_groups}. Calibrate for these: passopt calibrate MODEL {wanted} …, or quantise with "
            f"int{12 - bits}{{from={calibration.folder}}}"
        )
    if found is None:
        raise CalibrationError(
            f"{who}: {calibration.folder} holds what was measured on the input of {weight_key(weight)}, and no codes. "
            f"Make them, too: passopt calibrate MODEL --data FILE -o CALIB, with codes among what is collected"
        )
    calibration.check(weight, who)
    if found.entry.along != axis or found.codes.shape != weight.shape:
        raise CalibrationError(
            f"{who}: {calibration.folder} holds codes {list(found.codes.shape)} of {weight_key(weight)} with a scale "
            f"per index of axis {found.entry.along}, here it is read along axis {axis} of {list(weight.shape)}. "
            f"Calibrate this model again"
        )
    return found.codes, found.scales
