"""The requests of lm-eval, answered by our class alone and, where lm-eval is installed, as one of its models."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import passopt
from passopt.api.evaluate import candidate_for, reader_for
from passopt.evaluation.harness import HarnessModel, lm_eval_class
from passopt.ir.errors import UsageError


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    """Requests as lm-eval's `Instance` is one."""
    return [types.SimpleNamespace(args=args) for args in arguments]


@pytest.fixture(scope="module")
def model(lab) -> HarnessModel:
    candidate = candidate_for(lab.one, 1)
    return HarnessModel(candidate, reader_for([candidate], None))


def logs_of(lab, ids: list[int]) -> list[float]:
    rows = lab.log_probabilities(lab.one, ids[:-1])
    return [row[target] for row, target in zip(rows, ids[1:], strict=True)]


def test_loglikelihood(lab, model: HarnessModel):
    asked = requests(("the text", " says"), ("the text ", "says"), ("", "it"), ("it", "z"))
    found = model.loglikelihood(asked)
    expected = sum(logs_of(lab, lab.encode("the text says"))[7:])
    assert found[0][0] == found[1][0] == pytest.approx(expected, rel=1e-6)
    assert found[2][0] == pytest.approx(sum(logs_of(lab, [0, *lab.encode("it")])), rel=1e-6)
    best = int(lab.log_probabilities(lab.one, lab.encode("it"))[-1].argmax())
    assert found[3][1] is (best == lab.encode("z")[0])
    letter = model._reader.tokenizer.decode([best])
    assert model.loglikelihood(requests(("it", letter)))[0][1] is True
    with pytest.raises(UsageError, match="a continuation is empty"):
        model.loglikelihood(requests(("it", "")))


def test_a_context_that_is_too_long_loses_its_beginning(lab, model: HarnessModel):
    text = lab.words[:60]
    (found,) = model.loglikelihood(requests((text, " it")))
    assert found[0] == pytest.approx(sum(logs_of(lab, lab.encode(text + " it")[-49:])[-3:]), rel=1e-6)
    with pytest.raises(UsageError, match="60 tokens is longer than the 48 positions"):
        model.loglikelihood(requests(("", text)))


def test_rolling_counts_each_token_once(lab, model: HarnessModel):
    ids = [0, *lab.encode(lab.words * 2)]
    text = lab.words * 2
    found = model.loglikelihood_rolling(requests((text,), ("it",), ("",)))
    expected, done = 0.0, 1
    while done < len(ids):
        stop = min(done + 48, len(ids))
        expected += sum(logs_of(lab, ids[max(0, stop - 49) : stop])[-(stop - done) :])
        done = stop
    assert found == [
        pytest.approx(expected, rel=1e-6),
        pytest.approx(sum(logs_of(lab, [0, *lab.encode("it")])), rel=1e-6),
        0.0,
    ]


def test_generation_stops_where_it_is_told(lab, model: HarnessModel):
    (whole,) = model.generate_until(requests(("the text", {"max_gen_toks": 12})))
    ids = lab.encode("the text")
    for _ in range(12):
        ids.append(int(lab.log_probabilities(lab.one, ids)[-1].argmax()))
    assert whole == model._reader.tokenizer.decode(ids[8:])
    stop = whole[3:5]
    asked = requests(("the text", {"max_gen_toks": 12, "until": [stop, "never"]}), ("the text", {"until": stop}))
    assert model.generate_until(asked) == [whole[: whole.index(stop)]] * 2
    drawn = requests(("it", {"max_gen_toks": 5, "temperature": 0.8, "do_sample": True}))
    assert model.generate_until(drawn) == model.generate_until(drawn) != [""]


def test_a_prompt_leaves_room_for_what_follows(lab, model: HarnessModel):
    (found,) = model.generate_until(requests((lab.words, {"max_gen_toks": 8})))
    (short,) = model.generate_until(requests((lab.words[-40:], {"max_gen_toks": 8})))
    assert found == short


def test_without_lm_eval_it_says_what_to_install(lab, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match="needs lm_eval, which is not installed; pip install lm_eval"):
        passopt.lm_eval_model(lab.one)


def test_a_class_such_as_lm_evals_is_joined(lab, monkeypatch):
    class LM:
        def __init__(self) -> None:
            self.rank = 0

    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["lm_eval.api.model"], "LM", LM, raising=False)
    model = passopt.lm_eval_model(lab.one, threads=1)
    assert isinstance(model, LM)
    assert model.rank == 0
    assert model.tokenizer_name == str(lab.one)
    assert model.loglikelihood(requests(("it", " says")))[0][0] < 0
    model.close()


@pytest.mark.filterwarnings("default")
@pytest.mark.slow
def test_lm_eval_drives_a_model(lab, tmp_path: Path):
    evaluator = pytest.importorskip("lm_eval.evaluator", reason="lm-eval is not installed")
    base = pytest.importorskip("lm_eval.api.model").LM
    assert issubclass(lm_eval_class(), base)
    (tmp_path / "questions.jsonl").write_text(
        "".join(f'{{"q": "the text", "c": ["says", "reads it"], "a": {index % 2}}}\n' for index in range(4))
    )
    task = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "{{a}}",
    }
    found = evaluator.simple_evaluate(model=passopt.lm_eval_model(lab.one, threads=1), tasks=[task], bootstrap_iters=0)
    assert found["results"]["letters"]["acc,none"] == 0.5
    logs = [entry["resps"] for entry in found["samples"]["letters"]]
    own = HarnessModel.loglikelihood(
        passopt.lm_eval_model(lab.one, threads=1), requests(("the text", " says"), ("the text", " reads it"))
    )
    assert np.ravel([float(item[0][0]) for item in logs[0]]) == pytest.approx([log for log, _ in own], rel=1e-6)
