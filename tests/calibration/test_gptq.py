"""The sums, factors and codes of GPTQ: against fp64, and the same bits for any chunks and number of threads."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("threadpoolctl")

from passopt.calibration import codes as codes_module
from passopt.calibration import gram as gram_module
from passopt.calibration import tiles as tiles_module
from passopt.calibration.codes import Order, block_rounder, round_block_by_numpy, round_weight
from passopt.calibration.gram import Gram
from passopt.calibration.inverse_factor import factor_inverse
from passopt.calibration.tiles import TileRunner
from passopt.ir.errors import ModelError

Array = np.ndarray


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 8 and blocks of 5, so that small matrices have several, and shorter last ones."""
    monkeypatch.setattr(tiles_module.tiles, "__defaults__", (8,))
    monkeypatch.setattr(gram_module, "_BLOCK", 10)
    monkeypatch.setattr(codes_module, "_BLOCK", 5)
    monkeypatch.setattr(codes_module, "_ROWS", 3)


def inputs(count: int, width: int, seed: int = 0) -> Array:
    """Inputs of which some channels are large, and neighbours alike."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((count, width)) @ (np.eye(width) + 0.9 * np.eye(width, k=1))
    return (mixed * np.exp(random.standard_normal(width))).astype(np.float32)


def hessian(rows: Array, threads: int = 1, chunks: tuple[int, ...] = ()) -> Array:
    with TileRunner(threads) as runner:
        gram = Gram(rows.shape[1], runner)
        for part in np.split(rows, np.cumsum(chunks)):
            gram.add(part)
        return gram.hessian()


def test_the_hessian_is_the_mean_of_products() -> None:
    rows = inputs(57, 21)
    expected = 2 * rows.astype(np.float64).T @ rows / len(rows)
    found = hessian(rows)
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.array_equal(found, found.T)


@pytest.mark.parametrize("chunks", [(1, 2, 3), (10,), (13, 0, 30), (57,)])
@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_and_threads_change_no_bit(chunks: tuple[int, ...], threads: int) -> None:
    rows = inputs(57, 21)
    assert np.array_equal(hessian(rows, threads, chunks), hessian(rows))


def test_inputs_that_are_no_numbers_are_named() -> None:
    rows = inputs(4, 3)
    rows[2, 1] = np.nan
    with TileRunner() as runner:
        gram = Gram(3, runner)
        gram.add(inputs(5, 3))
        with pytest.raises(ModelError, match=r"down_proj: NaN or infinity in channel 1 of token 7"):
            gram.add(rows, "down_proj")
        with pytest.raises(ModelError, match="the calibration data is empty"):
            Gram(3, runner).hessian()


@pytest.mark.parametrize("width", [1, 7, 8, 9, 16, 29])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_factor_is_that_of_the_inverse(width: int, threads: int) -> None:
    original = hessian(inputs(200, width))
    with TileRunner(threads) as runner:
        found = factor_inverse(original.copy(), 0.01, runner)
    upper = np.triu(found.upper).astype(np.float64)
    damped = original.astype(np.float64) + 0.01 * original.diagonal().mean(dtype=np.float64) * np.eye(width)
    assert np.allclose(upper @ damped @ upper.T, np.eye(width), atol=2e-4)
    assert found.damp == 0.01
    assert not found.dead.any()


def test_threads_change_no_bit_of_the_factor() -> None:
    original = hessian(inputs(200, 29))
    found = []
    for threads in (1, 2, 3):
        with TileRunner(threads) as runner:
            found.append(np.triu(factor_inverse(original.copy(), 0.01, runner).upper))
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_fewer_inputs_than_channels_need_damping_only() -> None:
    original = hessian(inputs(5, 29))
    with TileRunner() as runner:
        found = factor_inverse(original.copy(), 0.01, runner)
    assert np.isfinite(np.triu(found.upper)).all()


def test_what_is_not_positive_definite_gets_more_damping_and_then_an_error() -> None:
    original = hessian(inputs(200, 20))
    bad = original.copy()
    bad[3, 15] = bad[15, 3] = 3 * np.sqrt(bad[3, 3] * bad[15, 15])
    with TileRunner() as runner:
        found = factor_inverse(bad.copy(), 0.01, runner)
        assert found.damp > 0.01
        upper = np.triu(found.upper).astype(np.float64)
        damped = bad + found.damp * bad.diagonal().mean(dtype=np.float64) * np.eye(20)
        assert np.allclose(upper @ damped @ upper.T, np.eye(20), atol=1e-3)
        bad[3, 15] = bad[15, 3] = 1e4 * bad.diagonal().max()
        with pytest.raises(ModelError, match=r"o_proj: its Hessian is not positive definite at any damping up to 10"):
            factor_inverse(bad, 0.01, runner, "o_proj")


def test_dead_channels_are_rounded_to_the_nearest() -> None:
    rows = inputs(60, 12)
    rows[:, [2, 9]] = 0
    weight = np.random.default_rng(1).standard_normal((7, 12)).astype(np.float32)
    found = quantised(weight, hessian(rows))
    assert np.array_equal(found[:, [2, 9]], np.rint(weight[:, [2, 9]] / scales_of(weight)))
    assert np.abs(found).max() == 127


def scales_of(weight: Array, groups: int = 1, largest: int = 127) -> Array:
    peaks = np.abs(weight.reshape(len(weight), groups, -1)).max(axis=2)
    return np.where(peaks == 0, 1, peaks / largest).astype(np.float32)


def quantised(
    weight: Array, curvature: Array, threads: int = 1, groups: int = 1, largest: int = 127, by_activity: bool = True
) -> Array:
    order = Order.of(curvature.diagonal(), by_activity=by_activity)
    turned = curvature[order.columns][:, order.columns]
    with TileRunner(threads) as runner:
        factor = factor_inverse(turned, 0.01, runner)
        moved = np.ascontiguousarray(weight[:, order.columns])
        return round_weight(moved, scales_of(weight, groups, largest), factor, order, largest, runner)


def reference(weight: Array, curvature: Array, scales: Array, largest: int, by_activity: bool) -> Array:
    """GPTQ as its paper states it, in fp64 and column by column."""
    count = weight.shape[1]
    columns = np.argsort(-curvature.diagonal(), kind="stable") if by_activity else np.arange(count)
    damped = curvature.astype(np.float64) + 0.01 * curvature.diagonal().mean() * np.eye(count)
    upper = np.linalg.cholesky(np.linalg.inv(damped[columns][:, columns])).T
    left, codes = weight.astype(np.float64)[:, columns], np.empty(weight.shape, np.int8)
    for place, column in enumerate(columns):
        scale = scales[:, column // (count // scales.shape[1])]
        code = np.clip(np.rint(left[:, place] / scale), -largest, largest)
        codes[:, column] = code
        error = (left[:, place] - code * scale) / upper[place, place]
        left[:, place:] -= error[:, None] * upper[place, place:]
    return codes


@pytest.mark.parametrize("by_activity", [True, False])
@pytest.mark.parametrize(("groups", "largest"), [(1, 127), (1, 7), (3, 7)])
def test_codes_are_those_of_the_paper(by_activity: bool, groups: int, largest: int) -> None:
    """But for single ones that lie at a half, where the last bits decide."""
    weight = np.random.default_rng(2).standard_normal((40, 24)).astype(np.float32)
    curvature = hessian(inputs(300, 24))
    found = quantised(weight, curvature, 1, groups, largest, by_activity)
    expected = reference(weight, curvature, scales_of(weight, groups, largest), largest, by_activity)
    assert (found != expected).mean() < 0.01


def test_the_output_error_is_far_below_that_of_rounding_to_nearest() -> None:
    weight = np.random.default_rng(3).standard_normal((32, 24)).astype(np.float32)
    rows = inputs(400, 24)
    scale = scales_of(weight, 1, 7)
    nearest = np.clip(np.rint(weight / scale), -7, 7) * scale
    found = quantised(weight, hessian(rows), largest=7) * scale
    errors = [np.square(rows @ (one - weight).T).mean() for one in (found, nearest)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_code(threads: int) -> None:
    weight = np.random.default_rng(4).standard_normal((50, 24)).astype(np.float32)
    curvature = hessian(inputs(300, 24))
    assert np.array_equal(quantised(weight, curvature, threads), quantised(weight, curvature))


def test_rows_by_themselves_have_the_same_codes() -> None:
    """So that the shard of a rank has the codes of the whole weight."""
    weight = np.random.default_rng(5).standard_normal((20, 24)).astype(np.float32)
    curvature = hessian(inputs(300, 24))
    whole = quantised(weight, curvature)
    assert np.array_equal(quantised(weight[7:13], curvature), whole[7:13])


def test_numpy_and_the_compiled_loop_give_the_same_bits() -> None:
    pytest.importorskip("numba")
    assert block_rounder() is not round_block_by_numpy
    random = np.random.default_rng(6)
    weight = random.standard_normal((300, 11)).astype(np.float32)
    scales = np.broadcast_to(scales_of(weight), weight.shape).T.copy()
    weight = weight.T.copy()
    upper = np.triu(random.standard_normal((11, 11))).astype(np.float32) * np.float32(0.1) + np.eye(
        11, dtype=np.float32
    )
    results = []
    for rounder in (round_block_by_numpy, block_rounder()):
        left, errors, found = weight.copy(), np.empty_like(weight), np.empty(weight.shape, np.int8)
        rounder(left, scales, upper, 127, errors, found)
        results.append((errors, found))
    assert np.array_equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][1], results[1][1])
