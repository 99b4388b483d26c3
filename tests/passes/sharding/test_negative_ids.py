"""A look-up by an input of a graph that is no decoder may count from the end of the table, on every rank."""

from __future__ import annotations

import numpy as np
import pytest

from passopt.ir.errors import PassError
from passopt.passes.sharding.shard import Shard
from passopt.testing.checking import check, read_model


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("kind", ["int32", "int64"])
def test_ids_count_from_the_end_of_a_table_that_ranks_share(kind, opset):
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g ({kind}[n,3] words) => (float[n,3,4] y) <float[10,6] table = random, float[6,8] up = random,
        float[8,4] down = random> {{
        r = Gather(table, words) u = MatMul(r, up) a = Relu(u) y = MatMul(a, down) }}"""
    ids = np.array([[0, -1, 9], [-10, 4, -6]], kind)
    model, _ = check(Shard(degree=2), text, feeds={"words": ids}, lengths={"n": 2})
    assert any(
        value.name == "table.rank" or "vocab.start" in str(value.name) for value in model.graph.initializers.values()
    )


def test_declines_a_table_below_opset_13():
    text = """<ir_version: 7, opset_import: ["" : 12]>
        g (int64[n,3] words) => (float[n,3,4] y) <float[10,6] table = random, float[6,8] up = random,
        float[8,4] down = random> {
        [rows] r = Gather(table, words) u = MatMul(r, up) a = Relu(u) y = MatMul(a, down) }"""
    with pytest.raises(PassError, match="table of Gather 'rows' needs opset 13, this model has 12. Run legalize first"):
        Shard(degree=2).run(read_model(text))


def test_declines_an_output_to_be_cut_below_opset_10():
    text = """<ir_version: 7, opset_import: ["" : 9]>
        g (float[n,6] x) => (float[n,5] y) <float[6,5] w = random> { y = MatMul(x, w) }"""
    with pytest.raises(PassError, match="cutting off the padding of y.* needs opset 10, this model has 9"):
        Shard(degree=2, pad=True).run(read_model(text))
