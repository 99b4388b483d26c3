"""split-packed-qkv on both spellings of a packed projection."""

from passopt.passes.split_packed_qkv import SplitPackedQkv


def test_split_weight_is_cut_by_columns(check_pass):
    check_pass(
        SplitPackedQkv(),
        """
        <ir_version: 10, opset_import: ["" : 18]>
        attn (float[3,2] x) => (float[3,1] q, float[3,1] k, float[3,2] v)
        <float[2,4] w = {1, 2, 3, 4, 5, 6, 7, 8}, int64[3] sizes = {1, 1, 2}> {
            qkv = MatMul(x, w)
            q, k, v = Split <axis = -1> (qkv, sizes)
        }""",
        matches=1,
    )
