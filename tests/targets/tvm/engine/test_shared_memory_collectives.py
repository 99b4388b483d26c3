"""Collectives of ranks that are threads: any size and axis, sums in the order of ranks, and ranks that do not come."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from passopt.ir.errors import ModelError
from passopt.targets.tvm.engine import shared_memory_collectives
from passopt.targets.tvm.engine.shared_memory_collectives import CollectiveError, Group, create_room


@pytest.fixture
def run(tmp_path):
    """`run(degree, work)`: `work(group)` on every rank at once; the results, errors included, in order."""

    def start(degree, work, timeout=20.0):
        create_room(tmp_path, degree)
        groups = [Group(tmp_path, rank, degree, timeout) for rank in range(degree)]
        results = [None] * degree

        def serve(rank):
            try:
                results[rank] = work(groups[rank])
            except CollectiveError as error:
                results[rank] = error

        threads = [threading.Thread(target=serve, args=(rank,)) for rank in range(degree)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return start


def numbers(rank, shape, step=0):
    return np.random.default_rng([rank, step]).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("shape", [(1,), (2, 1, 7), (3, 5, 11)])
def test_sums_are_those_of_numpy_in_the_order_of_ranks(run, degree, shape):
    def work(group):
        found = []
        for step in range(20):
            result = np.empty(shape, np.float32)
            group.all_reduce(numbers(group.rank, shape, step), result)
            found.append(result)
        return found

    results = run(degree, work)
    for step in range(20):
        expected = numbers(0, shape, step)
        for rank in range(1, degree):
            expected = expected + numbers(rank, shape, step)
        for result in results:
            np.testing.assert_array_equal(result[step], expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("degree", [2, 3])
def test_parts_are_joined_along_the_axis(run, degree, axis):
    shape = (3, 5, 7)
    whole = tuple(length * (degree if position == axis else 1) for position, length in enumerate(shape))

    def work(group):
        result = np.empty(whole, np.float32)
        group.all_gather(numbers(group.rank, shape), result)
        return result

    expected = np.concatenate([numbers(rank, shape) for rank in range(degree)], axis)
    for result in run(degree, work):
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(("shape", "axis"), [((7, 9), 1), ((9, 7), 0), ((2, 40), 1), ((40, 2), 1)])
def test_what_is_larger_than_a_piece_goes_in_several(run, monkeypatch, shape, axis):
    monkeypatch.setattr(shared_memory_collectives, "PIECE", 64)
    whole = tuple(length * (2 if position == axis else 1) for position, length in enumerate(shape))

    def work(group):
        total, joined = np.empty(shape, np.float32), np.empty(whole, np.float32)
        group.all_reduce(numbers(group.rank, shape), total)
        group.all_gather(numbers(group.rank, shape), joined)
        return total, joined

    parts = [numbers(rank, shape) for rank in range(2)]
    for total, joined in run(2, work):
        np.testing.assert_array_equal(total, parts[0] + parts[1])
        np.testing.assert_array_equal(joined, np.concatenate(parts, axis))


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named(run):
    def work(group):
        if group.rank == 1:
            return None
        result = np.empty(3, np.float32)
        group.all_reduce(numbers(group.rank, 3), result)
        return result

    results = run(3, work, timeout=0.3)
    for rank in (0, 2):
        assert "rank 1 did not come to collective piece 1 within 0.3 s" in str(results[rank])


def test_ranks_of_different_programs_are_told(run):
    def work(group):
        shape = 3 + group.rank
        result = np.empty(shape, np.float32)
        group.all_reduce(numbers(group.rank, shape), result)

    for result in run(2, work):
        assert str(result) == "piece 1: ranks bring [12, 16] bytes; they run different programs"


def test_nobody_waits_for_a_group_that_was_given_up(run):
    def work(group):
        if group.rank == 1:
            group.counters.give_up()
            return None
        result = np.empty(3, np.float32)
        group.all_reduce(numbers(0, 3), result)
        return result

    assert str(run(2, work)[0]) == "rank 0 stops: the others have ended"


def test_no_room_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ModelError, match="no room for 4,194,304 bytes between ranks: No space left on device"):
        create_room(tmp_path, 2)
