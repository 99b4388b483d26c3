"""What a library could not be called with is refused when it is compiled, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from passopt.ir.errors import ModelError
from passopt.ir.serialization.model_files import load_model
from passopt.targets.tvm.compiler.compile_models import check_inputs

PASTS = '"past.0.key", float[batch,2,past,3] "past.0.value"'


@pytest.fixture
def check(decoder_text, tmp_path: Path):
    """Check a decoder whose text has `old` replaced by `new`."""

    def run(old: str = "", new: str = "") -> None:
        text = decoder_text("logits = Add (y, x)")
        assert old in text
        (tmp_path / "model.onnxtxt").write_text(text.replace(old, new) if old else text)
        model = load_model(tmp_path / "model.onnxtxt")
        check_inputs(model, [str(value.name) for value in model.graph.inputs if "past" not in str(value.name)])

    return run


def test_a_decoder_of_this_contract_is_taken(check):
    check()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("int64[batch,seq] input_ids", "int64[batch,seq] token_type_ids, int64[batch,seq] input_ids", "token_type_ids"),
        ("int64[batch,seq] input_ids", "int64[batch,1] input_ids", r"\[batch,1\].*`phase=merged`"),
        (PASTS, f'{PASTS}, float[batch,3,past,3] "past.1.key"', r"past\.1\.key.*\[batch,3,past,3\].*same heads"),
        (PASTS, f'{PASTS}, float[batch,2,past,4] "past.1.key"', r"past\.1\.key.*same heads, width"),
        (PASTS, f'{PASTS}, float16[batch,2,past,3] "past.1.key"', r"past\.1\.key.*FLOAT16.*type"),
    ],
    ids=["unknown input", "one length", "heads", "width", "type"],
)
def test_others_are_refused(check, old: str, new: str, says: str):
    with pytest.raises(ModelError, match=says):
        check(old, new)
