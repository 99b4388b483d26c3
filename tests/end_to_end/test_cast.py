"""cast on both exported families: the numbers of an export in that dtype, through prefill, padding and decode."""

from __future__ import annotations

import json

import pytest

from passopt.cli import main


def cast(folder, tmp_path, passes):
    output = tmp_path / "cast"
    assert main(["run", str(folder / "model.onnx"), "--passes", passes, "-o", str(output)]) == 0
    return output


def verified(first, second, capsys, *options):
    capsys.readouterr()
    assert main(["verify", str(first), str(second), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("passes", ["cast{dtype=fp16}", "legalize{opset=23},cse,cast{dtype=fp16},cse"])
def test_fp16_within_what_fp16_has(family, tmp_path, capsys, passes):
    verified(family, cast(family, tmp_path, passes), capsys)


def test_bf16_through_twins(alibi, tmp_path, capsys):
    verified(alibi, cast(alibi, tmp_path, "cast{dtype=bf16}"), capsys, "--tolerance", "2e-2")


def test_as_the_export_in_fp16(alibi, alibi_fp16, tmp_path, capsys):
    """The same islands: not a bit differs from what the export itself writes."""
    verified(alibi_fp16, cast(alibi, tmp_path, "cast{dtype=fp16}"), capsys, "--tolerance", "1e-7")


def test_back_to_fp32(alibi, alibi_fp16, tmp_path, capsys):
    verified(alibi, cast(alibi_fp16, tmp_path, "cast{dtype=fp32}"), capsys, "--tolerance", "2e-3")


def test_then_int8_and_ranks(family, tmp_path, capsys):
    output = cast(family, tmp_path, "cast{dtype=fp16},tp,int8")
    verified(family, output, capsys, "--tolerance", "1e-1")
