"""Read a calibration folder: a manifest, and safetensors files with vectors, codes and scales.

Everything is found by the weight that a linear reads (`keys.weight_key`). Codes are never loaded here: a pass refers to
them by a `Source` in the folder, as to any weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from passopt.ir.calibration.entries import FORMAT, MANIFEST_NAME, VERSION, CacheEntry, CodesEntry, WeightEntry
from passopt.ir.calibration.keys import fingerprint, peeled, weight_key
from passopt.ir.errors import CalibrationError, ModelError
from passopt.ir.json_text import read_json
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import Expression, Source
from passopt.ir.weights.sources import safetensors_sources

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True)
class InputStatistics:
    """What was measured on the input of the linears that read a weight.

    Attributes:
        absmax: The largest magnitude of each channel, [k] fp32.
        percentiles: Percentiles of all magnitudes, such as {"99.9": 4.25}.
        rows: How many inputs were looked at.
        weight_absmax: The largest magnitude of the weight itself for each channel, [k] fp32; None if it was not taken.
    """

    absmax: Array
    percentiles: Mapping[str, float]
    rows: int
    weight_absmax: Array | None = None


@dataclasses.dataclass(frozen=True)
class StoredCodes:
    """The codes of a weight, as tensors in the folder.

    Attributes:
        codes: int8 codes in the layout of the weight as it is stored, without casts and transpositions.
        scales: A scale per output channel, or [channels, groups].
        entry: What else is known of them; `entry.along` is the axis of the output channels.
    """

    codes: Source
    scales: Source
    entry: CodesEntry


_opened: dict[tuple[str, int, int, int], Calibration] = {}


class Calibration:
    """A calibration folder that is open for reading.

    Attributes:
        folder: The folder.
        model: What is said of the model that was calibrated.
        data: What is said of the data: digest, nsamples, seqlen, seed.
        weights: What is known of each weight, by its key.
        cache: The ranges of keys and values, by the name of the graph's output.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.model: Mapping[str, Any] = manifest["model"]
        self.data: Mapping[str, Any] = manifest["data"]
        where = folder / MANIFEST_NAME
        entries = manifest["weights"].items()
        self.weights = {key: WeightEntry.from_json(body, f"{where}: {key}") for key, body in entries}
        self.cache = {name: CacheEntry(**body) for name, body in manifest["cache"].items()}
        self._sources: dict[str, Mapping[str, Source]] = {}

    @classmethod
    def open(cls, folder: Path | str) -> Calibration:
        """Read the manifest of a folder.

        Raises:
            CalibrationError: If there is no such folder.
            ModelError: If it is damaged, or of another version.
        """
        folder = Path(folder)
        path = folder / MANIFEST_NAME
        if not path.exists():
            raise CalibrationError(
                f"{folder}: holds no calibration. Make one: passopt calibrate MODEL --data FILE -o {folder}"
            )
        try:
            manifest = read_json(path)
            found = (manifest["format"], manifest["version"])
            if found != (FORMAT, VERSION):
                raise ModelError(f"{path}: is of format {found[0]} {found[1]}, expected {FORMAT} {VERSION}")
            for name, size in manifest["files"].items():
                _check_size(folder / name, size)
            return cls(folder, manifest)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path}: is not the manifest of a calibration: {error!r}. Calibrate again.") from error

    @classmethod
    def of(cls, folder: Path | str) -> Calibration:
        """Return `open(folder)`, read once per version of its manifest: a pass asks it for every weight."""
        folder = Path(folder)
        try:
            stat = (folder / MANIFEST_NAME).stat()
        except OSError:
            return cls.open(folder)
        key = (str(folder.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ino)
        if key not in _opened:
            _opened[key] = cls.open(folder)
        return _opened[key]

    def statistics(self, key: str) -> InputStatistics | None:
        """Return what was measured on the input of a weight, or None if it was not looked at."""
        entry = self.weights.get(key)
        if entry is None or not entry.absmax:
            return None
        weight = self._read(entry.file, entry.weight_absmax) if entry.weight_absmax else None
        return InputStatistics(self._read(entry.file, entry.absmax), entry.percentiles, entry.rows, weight)

    def codes(self, key: str, *, bits: int = 8, group: int = 0) -> StoredCodes | None:
        """Return the codes of a weight of so many bits and groups, or None if there are none."""
        entry = self.weights.get(key)
        for item in entry.codes if entry is not None else ():
            if (item.bits, item.group) == (bits, group):
                assert entry is not None
                return StoredCodes(self._source(entry.file, item.codes), self._source(entry.file, item.scales), item)
        return None

    def cache_absmax(self, name: str) -> Array | None:
        """Return the largest magnitudes [kv heads, head dimension] of an output such as present.0.key.

        None says that they were not looked at.
        """
        entry = self.cache.get(name)
        return None if entry is None else self._read(entry.file, entry.absmax)

    def required(self, weight: Expression, who: str) -> InputStatistics:
        """Return what was measured on the input of a weight, which must be that of the same model.

        Args:
            weight: The weight.
            who: The pass that asks, for messages.

        Raises:
            CalibrationError: If it was not looked at, or the weight has other numbers now.
        """
        found = self.statistics(weight_key(weight))
        if found is None:
            raise self.unknown(weight, who)
        self.check(weight, who)
        return found

    def check(self, weight: Expression, who: str) -> None:
        """Raise CalibrationError unless a weight has the numbers that it had when it was calibrated.

        Args:
            weight: The weight, which the folder knows.
            who: The pass that asks, for messages.
        """
        entry = self.weights[weight_key(weight)]
        if fingerprint(weight) != entry.fingerprint:
            raise CalibrationError(
                f"{who}: {self.folder} was made of another model: its weight {entry.name!r} has other numbers than "
                f"{weight_key(weight)} has here. Calibrate this model: passopt calibrate MODEL --data FILE -o CALIB"
            )

    def unknown(self, weight: Expression, who: str) -> CalibrationError:
        """Return the error that the folder does not know a weight."""
        passes = self.model.get("passes")
        after = f" It was made after the passes {passes}." if passes else " It was made of a model without passes."
        return CalibrationError(
            f"{who}: {self.folder} knows nothing of {peeled(weight).text()}, but {len(self.weights)} other weights."
            f"{after} Calibrate what this pass works on: passopt calibrate MODEL --passes PASSES --data FILE -o CALIB, "
            f"with the passes that stand before {who}"
        )

    def _source(self, file: str, name: str) -> Source:
        if file not in self._sources:
            self._sources[file] = safetensors_sources(self.folder / file)
        found = self._sources[file].get(name)
        if found is None:
            raise ModelError(f"{self.folder / file}: lacks the tensor {name!r}. Calibrate again.")
        return found

    def _read(self, file: str, name: str) -> Array:
        with Evaluator() as evaluator:
            return evaluator.array(self._source(file, name))


def _check_size(path: Path, size: int) -> None:
    found = path.stat().st_size if path.is_file() else -1
    if found != size:
        state = "is missing" if found < 0 else f"has {found} bytes, expected {size}"
        raise ModelError(f"{path}: {state}; the calibration is damaged. Calibrate again.")
