"""Perplexity and divergence of texts against direct formulas over whole windows."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

import passopt
from passopt.evaluation import scored_rows
from passopt.ir.errors import ModelError, UsageError


def figures(report: passopt.EvalReport, model: int, text: int = 0):
    return report.models[model].texts[text]


def windows_of(ids: list[int], window: int, stride: int) -> list[tuple[list[int], int]]:
    """Windows as Hugging Face's page on perplexity cuts them: tokens, and how many of the last ones count."""
    found, before = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        found.append((ids[begin:end], min(end - before, end - begin - 1)))
        before = end
        if end == len(ids):
            break
    return found


@pytest.mark.parametrize(("window", "stride"), [(40, None), (40, 13), (24, 5)])
def test_perplexity_and_divergence_are_those_of_the_formulas(lab, window, stride):
    report = passopt.evaluate(
        [lab.one, lab.int8],
        text=lab.text,
        window=window,
        stride=stride,
        max_tokens=200,
        cache_dtype="fp32",
    )
    surprise, kl, same = [], [], []
    for ids, scored in windows_of(lab.encode(lab.words * 6)[:200], window, stride or window):
        one, other = (lab.log_probabilities(lab.root / name, ids)[-1 - scored : -1] for name in ("one", "int8"))
        surprise += [-row[target] for row, target in zip(one, ids[-scored:])]
        kl += list((np.exp(one) * (one - other)).sum(axis=-1))
        same += list(one.argmax(axis=-1) == other.argmax(axis=-1))
    first, second = figures(report, 0), figures(report, 1)
    assert report.texts[0].scored == len(surprise)
    assert first.surprise.value == pytest.approx(np.mean(surprise), rel=1e-6)
    assert first.perplexity.value == pytest.approx(math.exp(np.mean(surprise)), rel=1e-6)
    assert first.kl_mean is None
    assert second.kl_mean.value == pytest.approx(np.mean(kl), rel=1e-3)
    assert second.kl_median.value == pytest.approx(np.median(kl), rel=2e-2, abs=1e-9)
    assert second.kl_high.value == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert second.top1.value == np.mean(same)


def test_a_model_compared_with_itself_is_equal(lab):
    report = passopt.evaluate([lab.one, lab.one], text=lab.text, window=32)
    for kept in ("fp16", "fp32"):
        assert report.kept == "fp16"
        found = figures(report, 1)
        assert found.kl_mean.value == found.kl_high.value == found.more_surprise.value == 0, kept
        assert found.top1.value == 1
        assert "100 ± 0" in str(report)


def test_fp16_moves_a_divergence_by_little(lab):
    both = [
        figures(
            passopt.evaluate([lab.one, lab.other], text=lab.text, window=48, cache_dtype=kept),
            1,
        )
        for kept in ("fp16", "fp32")
    ]
    assert both[0].kl_mean.value == pytest.approx(both[1].kl_mean.value, rel=1e-4)
    assert both[0].top1 == both[1].top1
    assert both[0].more_surprise == both[1].more_surprise


def test_chunks_of_a_window_give_what_the_whole_gives(lab, monkeypatch: pytest.MonkeyPatch):
    whole = passopt.evaluate(lab.one, text=lab.text, window=48)
    monkeypatch.setattr(scored_rows, "CHUNK", 7)
    parts = passopt.evaluate(lab.one, text=lab.text, window=48)
    assert figures(parts, 0).surprise.value == pytest.approx(figures(whole, 0).surprise.value, rel=1e-6)


def test_a_cache_in_8_bits_is_read_as_codes_in_one_step_and_in_many(lab, tmp_path: Path, monkeypatch):
    passopt.run(lab.one, "fuse,int8-cache", tmp_path / "codes")
    asked = {"text": lab.text, "window": 48, "max_tokens": 192}
    whole = passopt.evaluate([lab.one, tmp_path / "codes"], **asked)
    monkeypatch.setattr(scored_rows, "CHUNK", 5)
    parts = passopt.evaluate([lab.one, tmp_path / "codes"], **asked)
    found, again = figures(whole, 1).kl_mean, figures(parts, 1).kl_mean
    assert 1e-8 < found.value < 1e-2
    assert again.value == pytest.approx(found.value, rel=1e-2)


def test_a_model_of_the_last_position_only_is_run_token_by_token(lab, tmp_path: Path):
    passopt.run(lab.one, "slice-last-token", tmp_path / "sliced")
    report = passopt.evaluate([lab.one, tmp_path / "sliced"], text=lab.text, window=30, stride=20, max_tokens=70)
    assert figures(report, 1).surprise.value == pytest.approx(figures(report, 0).surprise.value, rel=1e-6)
    assert figures(report, 1).kl_mean.value < 1e-6


def test_the_reference_comes_first_once(lab):
    one, other = lab.one, lab.other
    asked = {"text": lab.text, "window": 40}
    report = passopt.evaluate([other, str(one)], reference=one, **asked)
    assert [model.name for model in report.models] == [str(one), str(other)]
    again = passopt.evaluate([one, other], **asked)
    assert figures(report, 1) == figures(again, 1)


def test_sharded_ranks_and_graphs_in_memory_are_evaluated(lab, tmp_path: Path):
    passopt.run(lab.one, "tp{degree=3,pad=true}", tmp_path / "ranks")
    graph = passopt.load(lab.one)
    report = passopt.evaluate([graph, tmp_path / "ranks"], text=lab.text, window=48, max_tokens=200)
    assert figures(report, 1).kl_mean.value < 1e-6


def test_documents_of_other_formats_follow_one_another(lab, tmp_path: Path):
    lines = [json.dumps({"text": lab.words, "url": "x"}), json.dumps({"text": "a c"})] * 2
    path = tmp_path / "c4.json.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    entry = {"instruction": lab.words.strip(), "input": "", "output": "it says"}
    (tmp_path / "alpaca.json").write_text(json.dumps([entry]))
    report = passopt.evaluate(lab.one, c4=path, data=f"alpaca:{tmp_path / 'alpaca.json'}", window=48)
    assert [text.tokens for text in report.texts] == [2 * (len(lab.words) + 3), len(lab.words) + len("it says")]


def test_what_begins_a_text_is_read_and_not_scored(lab, tmp_path: Path):
    model = lab.save_decoder(tmp_path / "bos", begin=True)
    (tmp_path / "text.txt").write_text(lab.words * 2)
    ids = lab.encode(lab.words * 2)
    once = passopt.evaluate(model, text=tmp_path / "text.txt", window=40, max_tokens=81)
    everywhere = passopt.evaluate(model, text=tmp_path / "text.txt", window=40, max_tokens=81, bos=True)

    def surprise(windows: list[list[int]]) -> float:
        found = []
        for window in windows:
            rows = lab.log_probabilities(model, window)
            found += [-row[target] for row, target in zip(rows, window[1:])]
        return float(np.mean(found))

    assert figures(once, 0).surprise.value == pytest.approx(surprise([[1, *ids[:39]], ids[39:79]]), rel=1e-6)
    assert figures(everywhere, 0).surprise.value == pytest.approx(
        surprise([[1, *ids[:39]], [1, *ids[39:78]]]), rel=1e-6
    )
    assert everywhere.texts[0].scored == 78


def test_few_tokens_are_called_noise(lab):
    report = passopt.evaluate(lab.one, text=lab.text, window=48, max_tokens=100)
    assert any("NOISE" in note and "94 tokens only" in note for note in report.notes)
    assert report.to_json()["models"][0]["texts"][0]["kl_mean"] is None


def wrong(message: str, kind: type[Exception] = UsageError):
    return pytest.raises(kind, match=message)


def test_declines_what_does_not_fit(lab, tmp_path: Path):
    text, one = lab.text, lab.one
    with wrong("nothing to evaluate on"):
        passopt.evaluate(one)
    with wrong("has 48 positions"):
        passopt.evaluate(one, text=text, window=64)
    with wrong("is shorter than a window of 48 tokens: `max_tokens` allows 30"):
        passopt.evaluate(one, text=text, max_tokens=30)
    (tmp_path / "short.txt").write_text("it says")
    with wrong("is shorter than a window of 48 tokens: it has 7 tokens"):
        passopt.evaluate(one, text=tmp_path / "short.txt")
    with wrong("`stride` is 40, more than `window`"):
        passopt.evaluate(one, text=text, window=30, stride=40)
    with wrong("there is no such file"):
        passopt.evaluate(one, text=tmp_path / "none.txt")
    with wrong("no such model", ModelError):
        passopt.evaluate([one, lab.root / "none"], text=text)
    (tmp_path / "empty.txt").write_text("")
    with wrong("holds no text"):
        passopt.evaluate(one, text=tmp_path / "empty.txt")
    with wrong("name one with `tokenizer`"):
        passopt.evaluate(passopt.load(one).ir, text=text)


def test_declines_a_model_without_tokenizer_and_one_of_another_vocabulary(lab, tmp_path: Path):
    small = lab.save_decoder(tmp_path / "small", vocab=31)
    with wrong(r"token id 33 is outside of its vocabulary \(0 to 30\)"):
        (tmp_path / "z.txt").write_text("z" * 60)
        passopt.evaluate(small, text=tmp_path / "z.txt")
    (tmp_path / "a.txt").write_text("a" * 60)
    with wrong("has 31 logits, the reference .*one has 34"):
        passopt.evaluate([lab.one, small], text=tmp_path / "a.txt")
    (small / "tokenizer.json").unlink()
    with wrong("has no tokenizer.json and no tokenizer.model"):
        passopt.evaluate(small, text=lab.text)


def test_declines_logits_that_are_not_finite(lab, tmp_path: Path):
    model = passopt.load(lab.one)
    weights = {name: value.const_value.numpy().copy() for name, value in model.ir.graph.initializers.items()}
    name = next(name for name, array in weights.items() if array.shape == (34, 10))
    weights[name][3] = np.nan  # the space

    model.ir.graph.initializers[name].const_value = onnx_ir.tensor(weights[name], name=name)
    with wrong("its logits after token .* are not finite", ModelError):
        passopt.evaluate([lab.one, model], text=lab.text, window=48)
