"""The loop over an engine that is a formula: padding, ends, lengths, order of events."""

import numpy as np
import pytest

from passopt.generation.loop import CHUNK, generate
from passopt.generation.sampling import Sampling
from passopt.ir.errors import ModelError, UsageError

GREEDY = Sampling()
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5]]


def run(engine, prompts=PROMPTS, sampling=GREEDY, **options):
    return generate(engine, prompts, sampling, **{"max_new_tokens": 6} | options)


def test_greedy_takes_the_largest_logit_of_each_step(make_engine):
    engine = make_engine()
    seen = [5, 9]
    (row,) = run(engine, [seen]).rows
    for token in row.ids:
        engine.allocate(1, 50)
        logits = engine.forward([seen], [[1] * len(seen)])[0, -1]
        assert token == int(np.argmax(logits))
        seen = [*seen, token]
    assert len(row.ids) == 6
    assert row.end == "length"


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(do_sample=True, top_k=0, seed=-5, repetition_penalty=1.3)])
def test_a_batch_gives_what_its_prompts_give_alone(make_engine, sampling):
    together = run(make_engine(), sampling=sampling).rows
    if not sampling.do_sample:  # random numbers belong to the row
        assert [run(make_engine(), [prompt], sampling).rows[0] for prompt in PROMPTS] == list(together)
    assert run(make_engine(), [PROMPTS[0]], sampling).rows[0] == together[0]
    assert run(make_engine(), [PROMPTS[0], [7] * 9], sampling).rows[0] == together[0]


def test_rows_of_one_prompt_are_sampled_apart_and_a_seed_repeats_them(make_engine):
    sampling = Sampling(do_sample=True, top_k=0, seed=7)
    first, second = run(make_engine(), [[3], [3]], sampling).rows
    assert first != second
    assert run(make_engine(), [[3], [3]], sampling).rows == (first, second)
    assert run(make_engine(), [[3], [3]], Sampling(do_sample=True, top_k=0, seed=8)).rows != (first, second)
    unseeded = Sampling(do_sample=True, top_k=0)
    assert (
        run(make_engine(), [[3]], unseeded, max_new_tokens=20).rows
        != run(make_engine(), [[3]], unseeded, max_new_tokens=20).rows
    )


def test_a_caller_ends_rows_by_what_they_have_said(make_engine):
    whole = run(make_engine()).rows
    asked: list[tuple[int, tuple[int, ...]]] = []

    def stop(row: int, ids: list[int]) -> bool:
        asked.append((row, tuple(ids)))
        return row == 1 and len(ids) == 2

    ended: list[int] = []
    rows = run(make_engine(), stop=stop, on_end=ended.append).rows
    assert [row.end for row in rows] == ["length", "stop", "length"]
    assert [row.ids for row in rows] == [whole[0].ids, whole[1].ids[:2], whole[2].ids]
    assert asked[:4] == [(row, whole[row].ids[:1]) for row in range(3)] + [(0, whole[0].ids[:2])]
    assert ended == [1, 0, 2]


def test_each_row_ends_with_its_own_end_token(make_engine):
    whole = run(make_engine()).rows
    eos = whole[0].ids[2]
    result = run(make_engine(), eos=frozenset({eos}))
    for before, after in zip(whole, result.rows):
        cut = before.ids.index(eos) if eos in before.ids else None
        assert after.ids == before.ids[:cut]
        assert after.end == ("length" if cut is None else "eos")
    assert result.rows[0].end == "eos"
    assert result.new_tokens == sum(len(row.ids) + (row.end == "eos") for row in result.rows)


def test_nothing_is_run_after_all_rows_have_ended(make_engine):
    engine = make_engine()
    eos = run(engine, [[5, 9]]).rows[0].ids[1]
    engine.calls.clear()
    run(engine, [[5, 9]], eos=frozenset({eos}))
    assert engine.calls == [2, 1]


def test_events_come_in_order_and_say_all(make_engine):
    events: list[tuple] = []
    eos = run(make_engine()).rows[0].ids[2]
    result = run(
        make_engine(),
        eos=frozenset({eos}),
        on_token=lambda row, token: events.append((row, token)),
        on_end=lambda row: events.append((row,)),
    )
    for row, found in enumerate(result.rows):
        mine = [event for event in events if event[0] == row]
        assert mine == [*((row, token) for token in found.ids), (row,)]


def test_a_long_prompt_is_fed_in_chunks(make_engine):
    engine = make_engine()
    long = [index % 23 for index in range(2 * CHUNK + 3)]
    result = run(engine, [long, [4]], max_new_tokens=2)
    assert engine.calls == [CHUNK, CHUNK, 3, 1]
    assert result.prompt_tokens == len(long) + 1
    assert result.rows[1] == run(make_engine(), [[4]], max_new_tokens=2).rows[0]


def test_caches_are_as_large_as_needed_or_as_asked(make_engine):
    engine = make_engine()
    assert run(engine).cache_bytes == 8 * 3 * (5 + 5)
    assert run(engine, capacity=100).cache_bytes == 8 * 3 * 100


def test_generation_ends_where_the_positions_end(make_engine):
    engine = make_engine(max_positions=8)
    result = run(engine, [[1, 2, 3, 4, 5]], max_new_tokens=100)
    assert engine.past == 8
    assert len(result.rows[0].ids) == 4  # three are fed at positions 5 to 7, the last is not
    assert result.rows[0].end == "positions"
    assert result.rows[0].ids == run(make_engine(), [[1, 2, 3, 4, 5]], max_new_tokens=4).rows[0].ids
    assert len(run(engine, [[1] * 8], max_new_tokens=3).rows[0].ids) == 1


def test_figures(make_engine):
    result = run(make_engine())
    assert 0 < result.first_token < result.total
    assert result.tokens_per_second == pytest.approx(15 / (result.total - result.first_token))
    assert run(make_engine(), max_new_tokens=1).tokens_per_second is None


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "prompt 2 is empty"),
        ([[1] * 9], {}, "prompt 1 has 9 tokens, the model 8 positions"),
        ([[1, 23]], {}, r"prompt 1: token id 23 is outside of the vocabulary \(0 to 22\)"),
        ([[1]], {"max_new_tokens": 0}, "0 new tokens"),
        ([[1, 2]], {"capacity": 6}, "2 prompt tokens and 6 new ones take 7 columns of the cache, `capacity` is 6"),
    ],
)
def test_refused_before_anything_runs(make_engine, prompts, options, says):
    engine = make_engine(max_positions=8)
    with pytest.raises(UsageError, match=says):
        run(engine, prompts, **options)
    assert engine.calls == []


def test_pad_outside_of_the_vocabulary_is_never_fed(make_engine):
    expected = run(make_engine()).rows
    assert run(make_engine(), pad=1 << 20).rows == expected


def test_logits_that_are_no_numbers_are_told(make_engine, monkeypatch):
    engine = make_engine()
    whole = engine.forward

    def broken(ids, mask):
        logits = whole(ids, mask)
        logits[1, -1, 3] = np.nan
        return logits

    monkeypatch.setattr(engine, "forward", broken)
    with pytest.raises(ModelError, match="prompt 2: the logits of token 1 are not finite"):
        run(engine)
