"""A tiny decoder in a folder, and windows of tokens for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from passopt.calibration.calibrate import Report, calibrate
from passopt.calibration.meter import Meter
from passopt.calibration.parts import Settings
from passopt.calibration.targets import subject_of
from passopt.testing.decoders import DecoderSpec, tiny_decoder

SPEC = DecoderSpec()


class Tiny:
    """A tiny decoder, and what a calibration of it gives."""

    def __init__(self, root: Path, spec: DecoderSpec = SPEC) -> None:
        self.root = root
        self.spec = spec
        self.checkpoint = root / "checkpoint.safetensors"
        random = np.random.default_rng(3)
        self.ids = random.integers(0, spec.vocab, (6, 17))
        self.said: list[str] = []

    def model(self, **changes: object) -> onnx_ir.Model:
        return tiny_decoder(self.spec, checkpoint=self.checkpoint)

    def calibrate(
        self, name: str, settings: Settings | None = None, meter: Meter | None = None, **options: bool
    ) -> tuple[Path, Report]:
        folder = self.root / name
        subject = subject_of(self.model(), **options)
        report = calibrate(
            subject, self.ids, settings or Settings(), folder, {}, {}, meter or Meter(), self.said.append
        )
        return folder, report


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return Tiny(tmp_path)
