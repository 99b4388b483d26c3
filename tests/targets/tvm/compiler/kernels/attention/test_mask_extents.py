import numpy as np
import pytest

from passopt.targets.tvm.compiler.kernels.attention.mask_extents import MASKED, QUERY_BLOCK, mask_extents
from passopt.targets.tvm.compiler.kernels.standalone import compile_kernel

LOWEST = float(np.finfo(np.float32).min)


@pytest.fixture(scope="module")
def extents_of(cpu):
    kernel = compile_kernel(mask_extents(cpu.isa), cpu)

    def call(mask):
        extents = np.full((mask.shape[0], -(-mask.shape[2] // QUERY_BLOCK), 2), -1, np.int32)
        kernel(mask, extents)
        return extents

    return call


def reference(mask):
    _, _, length, columns = mask.shape
    blocks = []
    for rows in np.split(mask[:, 0], range(QUERY_BLOCK, length, QUERY_BLOCK), axis=1):
        most = rows.max(axis=2, keepdims=True)
        seen = ((rows > most - np.float32(MASKED)) | (most <= -MASKED)).any(axis=1)
        first = seen.argmax(axis=1)
        blocks.append(np.stack([first, columns - seen[:, ::-1].argmax(axis=1)], axis=1))
    return np.stack(blocks, axis=1)


def causal(padding, length, past, value):
    """[b, 1, s, t]; item i has `padding[i]` columns of padding on the left."""
    column, row = np.arange(past + length), np.arange(length)[:, None] + past
    hidden = np.stack([(column > row) | (column < pad) for pad in padding])
    return np.where(hidden, np.float32(value), np.float32(0))[:, None]


@pytest.mark.parametrize("value", [LOWEST, -65504.0, -np.inf])
@pytest.mark.parametrize(
    ("length", "past"), [(1, 0), (1, 200), (3, 1), (17, 16), (48, 0), (49, 15), (130, 17), (300, 0)]
)
def test_causal_with_padding(extents_of, length, past, value):
    total = length + past
    for padding in [(0,), (min(past, 5), 0), (0, total // 2, total - 1)]:
        mask = causal(padding, length, past, value)
        np.testing.assert_array_equal(extents_of(mask), reference(mask))


def test_a_block_with_a_row_that_sees_nothing_keeps_all_columns(extents_of):
    mask = causal((60,), 130, 0, LOWEST)
    assert extents_of(mask).tolist() == [[[0, 130], [0, 130], [60, 130]]]


def test_small_biases_hide_nothing(extents_of):
    mask = np.random.default_rng(0).uniform(-2000, 0, (1, 1, 5, 37)).astype(np.float32)
    assert extents_of(mask).tolist() == [[[0, 37]]]


def test_sliding_window(extents_of):
    mask = causal((0,), 130, 0, LOWEST)
    mask[0, 0][np.tril_indices(130, -10)] = LOWEST
    np.testing.assert_array_equal(extents_of(mask), reference(mask))
    assert extents_of(mask)[0, 1].tolist() == [39, 96]
