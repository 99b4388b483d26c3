"""Define what a calibration folder holds of each weight, as plain JSON of its manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from passopt.ir.errors import ModelError
from passopt.ir.json_text import stated

FORMAT, VERSION = "passopt-calibration", 1
MANIFEST_NAME = "manifest.json"


@dataclasses.dataclass(frozen=True)
class CodesEntry:
    """Codes that were made of a weight.

    Attributes:
        codes: The tensor of codes, int8 in the layout of the weight as it is stored.
        scales: The tensor of scales, in the dtype of the weight: one per output channel, or [channels, groups].
        along: The axis of the output channels in that layout.
        bits: 8 or 4; codes of 4 bits lie within ±7, each in a byte of its own.
        group: The inputs that share a scale; 0 for all of a channel.
        method: How they were made: "gptq", "mse", "rtn" or the name of the tool that they come from.
        damp: The damping that the factorisation needed; 0 where there was none.
        dead: The inputs that were zero in all of the data.
        note: What was done instead of what was asked for, and why; "" if nothing was.
    """

    codes: str
    scales: str
    along: int
    bits: int = 8
    group: int = 0
    method: str = "gptq"
    damp: float = 0.0
    dead: int = 0
    note: str = ""


@dataclasses.dataclass(frozen=True)
class WeightEntry:
    """What is known of a weight.

    Attributes:
        name: Its name in the graph that was calibrated, by which its tensors are called.
        file: The safetensors file that holds its tensors, relative to the folder.
        fingerprint: The digest of some of its bytes.
        rows: How many inputs of its linear were looked at.
        absmax: The tensor of the largest magnitudes of that input by channel; "" if there is none.
        percentiles: Percentiles of all magnitudes of that input, by their names, such as "99.9".
        codes: The codes that were made of it.
        weight_absmax: The tensor of the largest magnitudes of the weight itself by input channel; "" if there is none.
    """

    name: str
    file: str
    fingerprint: str
    rows: int = 0
    absmax: str = ""
    percentiles: Mapping[str, float] = dataclasses.field(default_factory=dict)
    codes: tuple[CodesEntry, ...] = ()
    weight_absmax: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the entry as it stands in the manifest."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any], where: str) -> WeightEntry:
        """Return an entry of a manifest.

        Args:
            body: The entry as it stands there.
            where: The file and the weight, for messages.

        Raises:
            ModelError: If it is damaged.
        """
        for key in ("name", "file", "fingerprint"):
            if stated(body, key, "a text", where) is None:
                raise ModelError(f"{where}: has no {key}; the file is damaged, or was edited wrongly")
        try:
            codes = tuple(CodesEntry(**item) for item in body.get("codes", ()))
            return cls(**{**body, "codes": codes})
        except TypeError as error:
            raise ModelError(f"{where}: is damaged, or of a newer passopt: {error}") from error


@dataclasses.dataclass(frozen=True)
class CacheEntry:
    """The keys or values of a layer, by the name of the graph's output.

    Attributes:
        file: The safetensors file that holds the tensor.
        absmax: The tensor of the largest magnitudes, [kv heads, head dimension].
        rows: How many positions were looked at.
    """

    file: str
    absmax: str
    rows: int

    def to_json(self) -> dict[str, Any]:
        """Return the entry as it stands in the manifest."""
        return dataclasses.asdict(self)
