"""What is read once, for whom, and from where: the grouping on which speed and memory stand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from passopt.ir.weights import expressions as ex
from passopt.ir.weights.concat import concat
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.literals import Literal
from passopt.ir.weights.streaming.output_groups import WeightFile, is_turned, schedule
from passopt.ir.weights.streaming.row_spans import Part, Span, spans_of


@pytest.fixture
def weight(stored):
    """A weight of a checkpoint as passes find it: bf16 in the file, fp16 in the graph."""

    def make(rows, columns, name="w"):
        array = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
        return stored(array.astype(ml_dtypes.bfloat16), name).cast(DataType.FLOAT16)

    return make


def files_of(weights, degree, tmp_path):
    return [WeightFile(tmp_path / f"rank{rank}", weights, rank) for rank in range(degree)]


def test_a_packed_qkv_is_read_once_for_all_parts_and_ranks(weight, tmp_path):
    packed = weight(36, 10)
    weights = {}
    for name, part in zip("qkv", packed.split([12, 12, 12], 0), strict=True):
        codes, scales = part.shard(0, 4).quantize()
        weights |= {f"{name}.codes": codes, f"{name}.scales": scales}
    (group,) = schedule(files_of(weights, 4, tmp_path))
    assert isinstance(group.base, ex.Source)
    assert len(group.outputs) == 4 * 6
    assert group.read_bytes == 36 * 10 * 2
    assert [type(core) for core in group.cores].count(ex.Cast) == 1
    assert {type(core) for core in group.stored_cores} == {ex.QuantizeCodes}


def test_row_parallel_shards_are_columns_of_the_codes(weight, tmp_path):
    codes, scales = weight(7, 12).shard(1, 3).quantize()
    (group,) = schedule(files_of({"codes": codes, "scales": scales}, 3, tmp_path))
    second = next(output for output in group.outputs if output.file == 1 and output.name == "codes")
    assert [(part.first, part.count) for part in second.parts()] == [(4, 4)]
    assert second.row_bytes == 4


def test_segments_and_padding_of_a_shard():
    expression = Literal.of(np.arange(12, dtype=np.float32).reshape(6, 2)).pad(0, 8, 2, 7.0).shard(0, 2, 2)
    source = expression.operand.operand
    assert spans_of(expression, 0) == [Span(2, (Part(source, 0, 0, 2),)), Span(2, (Part(source, 3, 0, 2),))]
    filled = Span(1, (Part(None, 0, 0, 2, 7.0),))
    assert spans_of(expression, 1) == [
        Span(1, (Part(source, 2, 0, 2),)),
        filled,
        Span(1, (Part(source, 5, 0, 2),)),
        filled,
    ]


def test_scales_of_padding_are_ones_and_codes_zeros():
    codes, scales = Literal.of(np.ones((3, 2), np.float32)).pad(0, 5).quantize()
    for expression, value in ((codes, 0.0), (scales, ex.SCALE_OF_ZEROS)):
        assert [part.value for part in spans_of(expression, 0)[-1].parts] == [value]
    normalized = Literal.of(np.ones((3, 2), np.float32)).pad(0, 5).normalize_rows(1e-12)
    assert [type(part.core) for span in spans_of(normalized, 0) for part in span.parts] == [
        ex.NormalizeRows,
        type(None),
    ]


def test_columns_of_two_weights_lie_side_by_side():
    left, right = (Literal.of(np.arange(6, dtype=np.float32).reshape(3, 2) + start) for start in (0, 10))
    joined = concat([left.pad(0, 4), right.pad(1, 3).slice(0, 0, 2).pad(0, 4)], 1)
    spans = spans_of(joined, 0)
    assert [span.rows for span in spans] == [2, 1, 1]
    assert [[part.core for part in span.parts] for span in spans] == [
        [left, right, None],
        [left, None],
        [None, None],
    ]


def test_what_cannot_pass_by_once_is_read_box_by_box(weight, tmp_path):
    first, second = weight(6, 4, "a"), weight(6, 4, "b")
    awkward = {
        "two bases": concat([first, second], 0),
        "backwards": concat([first.slice(0, 3, 6), first.slice(0, 0, 3)], 0),
        "columns": first.slice(0, 1, 4).transpose(),
    }
    groups = schedule(files_of(awkward, 1, tmp_path))
    assert len(groups) == 3
    assert all(group.is_boxed for group in groups)


def test_a_shard_that_only_boxes_can_read_is_a_group_per_rank(weight, tmp_path):
    crossed = concat([weight(4, 6), weight(6, 4, "b").transpose()], 0).shard(1, 2)
    groups = schedule(files_of({"w": crossed}, 2, tmp_path))
    assert sorted((group.rank, len(group.outputs)) for group in groups) == [(0, 1), (1, 1)]


def test_one_rank_reads_only_its_rows(weight, tmp_path):
    (group,) = schedule([WeightFile(tmp_path / "w", {"w": weight(12, 10).shard(0, 4)}, 2)])
    assert group.rows() == (6, 9)


def test_a_pack_is_made_of_whole_blocks_in_passing(weight, tmp_path):
    codes, scales = weight(20, 6).quantize()
    (group,) = schedule([WeightFile(tmp_path / "w", {"codes": codes.pack(8, 4), "scales": scales})])
    assert isinstance(group.base, ex.Source)
    packed = next(output for output in group.outputs if output.block)
    assert (packed.block, packed.row_bytes, packed.unit_bytes) == ((8, 2, 4), 6, 64)


def test_packs_of_shards_are_made_in_one_reading(weight, tmp_path):
    codes, scales = weight(20, 12).quantize()
    weights = {"rows": codes.shard(0, 4).pack(8, 4), "columns": codes.shard(1, 4).pad(1, 4).pack(8, 4), "s": scales}
    (group,) = schedule(files_of(weights, 4, tmp_path))
    assert isinstance(group.base, ex.Source)
    assert group.read_bytes == 20 * 12 * 2


def test_a_turned_weight_is_read_by_panels_once(weight, tmp_path):
    codes, scales = weight(12, 20).transpose().shard(0, 2).quantize()
    (group,) = schedule(files_of({"codes": codes, "scales": scales}, 2, tmp_path))
    assert is_turned(group.base)
    assert not group.is_boxed
    assert group.read_bytes == 20 * 12 * 2


def test_large_groups_come_first(weight, tmp_path):
    weights = {"small": weight(2, 3, "a"), "large": weight(30, 40, "b"), "middle": weight(9, 9, "c")}
    sizes = [group.read_bytes for group in schedule(files_of(weights, 1, tmp_path))]
    assert sizes == sorted(sizes, reverse=True)


def test_scales_of_columns_take_one_more_reading(weight, tmp_path):
    codes, scales = weight(9, 12).shard(1, 3).quantize(1)
    (group,) = schedule(files_of({"codes": codes, "scales": scales}, 3, tmp_path))
    assert isinstance(group.base, ex.Source)
    assert [group.is_summary(output) for output in group.outputs] == [
        output.name == "scales" for output in group.outputs
    ]
    assert group.read_bytes == 2 * 9 * 12 * 2
    assert len(group.measured) == 1


def test_columns_of_a_part_are_measured_in_that_part_only(weight, tmp_path):
    codes, _ = weight(9, 12).slice(0, 2, 5).quantize(1)
    (group,) = schedule([WeightFile(tmp_path / "w", {"codes": codes})])
    assert isinstance(group.base, ex.Slice)
