"""passopt calibrate: from data sets to int8{from=CALIB}, and what is said where something is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import passopt
from passopt.calibration.data import read_data
from passopt.cli import main
from passopt.ir.calibration.calibration import Calibration
from passopt.ir.errors import ModelError, UsageError
from passopt.testing.decoders import DecoderSpec, tiny_decoder

pytest.importorskip("tokenizers")
LETTERS = "abcdefghijklmnopqrstuvwxyz .\n"
SPEC = DecoderSpec()


def write_tokenizer(folder: Path, first: int = 0, begin: str = "") -> None:
    """A tokenizer of one token per letter, counted from `first`, and of one that begins every text if it is named."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {letter: index for index, letter in enumerate(LETTERS, first)}
    if begin:
        vocabulary[begin] = first + len(LETTERS)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])]
        )
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny decoder `model` and its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("calibrate")
    passopt.save(tiny_decoder(SPEC, checkpoint=folder / "one.safetensors"), folder / "model")
    write_tokenizer(folder / "model")
    random = np.random.default_rng(0)
    text = "".join(LETTERS[index] for index in random.integers(0, len(LETTERS), 3000))
    (folder / "text.txt").write_text(text)
    lines = [{"text": text[start : start + 90]} for start in range(0, 2700, 90)]
    (folder / "c4.json").write_text("\n".join(json.dumps(line) for line in lines))
    (folder / "empty.txt").write_text("")
    (folder / "half.json").write_text('{"text": "abc"}\n{"text": ')
    return folder


def calibrate(root: Path, *options: str, output: str = "calib") -> int:
    sizes = ("--nsamples", "4", "--seqlen", "16")
    return main(["calibrate", str(root / "model"), "-o", str(root / output), *sizes, *options])


def test_a_calibration_is_made_and_taken(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["--data", f"c4:{root / 'c4.json'}*3", "--data", str(root / "text.txt")]
    assert calibrate(root, *sets, "--threads", "2", output="taken") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith("64 tokens in 4 windows of 16, digest ")
    assert "12 weights have codes by gptq" in out
    assert err == ""
    data = Calibration.open(root / "taken").data
    assert [item["windows"] for item in data["sets"]] == [3, 1]
    passes = f"int8{{from={root / 'taken'}}}"
    assert main(["run", str(root / "model"), "--passes", passes, "-o", str(root / "quantised")]) == 0
    report = passopt.verify(root / "model", root / "quantised")
    assert [row for row in report.rows if "own" in row.comparison]
    assert all(row.ok for row in report.rows if "own codes" in row.comparison)


def test_json_is_for_machines(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(root, "--method", "rtn", "--collect", "codes", "--json", output="json") == 0
    body = json.loads(capsys.readouterr().out)
    assert body["method"] == "rtn"
    assert body["data"] == {}
    assert len(body["weights"]) == 12


def test_passes_run_before(root: Path) -> None:
    options = ["--data", str(root / "text.txt"), "--passes", "cast{dtype=fp16}"]
    assert calibrate(root, *options, output="passes") == 0
    calibration = Calibration.open(root / "passes")
    assert calibration.model["passes"] == "cast{dtype=fp16}"
    passes = f"cast{{dtype=fp16}},int8{{from={root / 'passes'}}}"
    assert main(["run", str(root / "model"), "--passes", passes, "-o", str(root / "cast")]) == 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "--data: name at least one calibration set, such as c4:c4-train.00000-of-01024.json.gz"),
        (["--data", "none.txt"], 2, "none.txt: there is no such file; a calibration set is read from a local file"),
        (["--data", "{root}/empty.txt"], 2, "empty.txt: holds text for 0 windows of 16 tokens, 4 are wanted"),
        (["--data", "{root}/half.json"], 2, "half.json, line 2: is not JSON"),
        (["--data", "{root}/text.txt", "--seqlen", "49"], 2, "--seqlen 49: this model takes at most 48 positions"),
        (["--data", "{root}/text.txt", "--nsamples", "9999"], 2, "9999 are wanted; give more text, or ask for fewer"),
        (["--data", "{root}/text.txt", "--collect", "code"], 2, "collect is one of inputs, cache, codes, not 'code'"),
        (["--data", "{root}/text.txt", "--passes", "int8"], 2, "int8 finds no linear in this model that it would"),
        (["--data", "{root}/text.txt", "--tokenizer", "{root}"], 2, "no tokenizer, neither tokenizer.model nor"),
        (["--data", "{root}/text.txt*0"], 2, "the weight 0 is no positive number"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    root: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, message: str
) -> None:
    before = sorted(path.name for path in root.iterdir())
    assert calibrate(root, *(item.format(root=root) for item in options), output="wrong") == code
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in root.iterdir()) == before


def test_a_calibration_of_another_model_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(root, "--data", str(root / "text.txt"), output="first") == 0
    passopt.save(tiny_decoder(SPEC, seed=1, checkpoint=root / "two.safetensors"), root / "other")
    passes = f"int8{{from={root / 'first'}}}"
    assert main(["run", str(root / "other"), "--passes", passes, "-o", str(root / "none")]) == 3
    assert "was made of another model: its weight" in capsys.readouterr().err
    assert not list(root.glob("none*"))


def test_a_tokenizer_of_another_model_is_named(root: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, first=20)
    model = tiny_decoder(dataclasses.replace(SPEC, vocab=34))
    with pytest.raises(ModelError, match=r"gives the token 4\d, and the embedding of the model has 34 rows"):
        read_data([str(root / "text.txt")], tmp_path, model, count=3, length=16, seed=0)


def test_every_window_begins_as_the_model_expects(root: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, begin="<s>")
    found = read_data([str(root / "text.txt")], tmp_path, tiny_decoder(SPEC), count=3, length=16, seed=0)
    assert (found.ids[:, 0] == len(LETTERS)).all()
    assert (found.ids[:, 1:] < len(LETTERS)).all()
    assert found.identity["seqlen"] == 16


def test_the_length_is_what_the_model_takes(root: Path) -> None:
    found = read_data([str(root / "text.txt")], root / "model", tiny_decoder(SPEC), count=2, length=None, seed=0)
    assert found.ids.shape == (2, SPEC.positions)


def test_conversations_go_through_the_chat_template(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    write_tokenizer(tmp_path)
    template = "{% for message in messages %}{{ message.role[0] }} {{ message.content }}.{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for _ in range(9)))
    found = read_data([str(tmp_path / "chat.jsonl")], tmp_path, tiny_decoder(SPEC), count=1, length=20, seed=0)
    assert "".join(LETTERS[index] for index in found.ids[0]) == "u hello.a you.u hell"


def test_a_model_in_memory_needs_a_tokenizer(root: Path) -> None:
    with pytest.raises(UsageError, match="a model in memory has no tokenizer beside it; name one"):
        passopt.calibrate(tiny_decoder(SPEC), root / "memory", data=str(root / "text.txt"))
    result = passopt.calibrate(
        tiny_decoder(SPEC), root / "memory", data=str(root / "text.txt"), tokenizer=root / "model", nsamples=2
    )
    assert result.ok
    assert str(result).endswith("memory")
