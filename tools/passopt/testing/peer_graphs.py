"""Build the small graphs that the tests of onnxruntime's and onnxscript's fusions are about, with random weights.

Each graph is written anew, after what such a test describes: the same operators in the same order, with unequal sizes.
`expected` counts what a reader finds in the graph; `reason` says why a part has no standard form, if it has none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

#: The parts that are counted, and the operators that stand for them.
OPERATORS: Mapping[str, tuple[str, ...]] = {
    "attention": ("Attention",),
    "layer norm": ("LayerNormalization",),
    "rms norm": ("RMSNormalization",),
    "gelu": ("Gelu", "Swish"),
    "rotary": ("RotaryEmbedding",),
}
LOWEST = "-3.4028235e38"


@dataclasses.dataclass(frozen=True)
class PeerGraph:
    """A graph of a peer's test.

    Attributes:
        name: Whose test it is of, and what it is.
        text: The graph as ONNX text; `random` stands for seeded weights.
        expected: How many of each part of `OPERATORS` a reader finds that are no operators yet.
        reason: Why not all of them become one operator; empty where all do.
        feeds: Inputs that must not be random, by name, for the lengths of `shapes`.
        shapes: Lengths of the symbolic dimensions to run with, several sets.
        passes: The pipeline that fuses it.
    """

    name: str
    text: str
    expected: Mapping[str, int]
    reason: str = ""
    feeds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shapes: tuple[Mapping[str, int], ...] = ({"b": 2, "s": 5}, {"b": 1, "s": 1}, {"b": 3, "s": 2})
    passes: str = "fuse"

    def inputs(self, lengths: Mapping[str, int]) -> Iterator[dict[str, npt.NDArray[np.generic]]]:
        """Yield inputs that replace random ones: masks that hide nothing, one end, and whole rows."""
        if not self.feeds:
            yield {}
            return
        for kind in ("full", "left", "right", "none"):
            made: dict[str, npt.NDArray[np.generic]] = {}
            for name, dims in self.feeds.items():
                array: npt.NDArray[np.generic] = np.ones([lengths[dim] for dim in dims.split(",")], np.int64)
                half = (array.shape[-1] + 1) // 2
                if kind != "full":
                    array[0, {"left": slice(half), "right": slice(half, None), "none": slice(None)}[kind]] = 0
                made[name] = array
            yield made


def _graph(head: str, constants: str, body: str, opset: int = 17, functions: str = "") -> str:
    return f'<ir_version: 10, opset_import: ["" : {opset}]>\ng ({head} <{constants}> {{\n{body}\n}}{functions}'


#: Weights of projections from 6 channels to 2 heads of width 4, and back.
_WEIGHTS = (
    "float[6,8] wq = random, float[6,8] wk = random, float[6,8] wv = random, float[8,6] wo = random,"
    "float[8] bq = random, float[8] bk = random, float[8] bv = random, float[6] bo = random,"
    "float[6] g = random, float[6] gb = random, int64[4] heads = {0, 0, 2, 4}, int64[3] flat = {0, 0, 8}"
)
_PROJECTED = """
    mq = MatMul(n, wq) aq = Add(mq, bq) rq = Reshape(aq, heads) q = Transpose <perm = [0, 2, 1, 3]> (rq)
    mk = MatMul(n, wk) ak = Add(mk, bk) rk = Reshape(ak, heads)
    mv = MatMul(n, wv) av = Add(mv, bv) rv = Reshape(av, heads) v = Transpose <perm = [0, 2, 1, 3]> (rv)"""
_NORM = "n = LayerNormalization <axis = -1> (x, g, gb)"
_OUT = """
    ob = Transpose <perm = [0, 2, 1, 3]> (o) of = Reshape(ob, flat) om = MatMul(of, wo) oa = Add(om, bo) t = Add(oa, n)
    y = LayerNormalization <axis = -1> (t, g, gb)"""
_HEAD = "float[b,s,6] x) => (float[b,s,6] y)"
_MASKED_HEAD = "float[b,s,6] x, int64[b,s] mask) => (float[b,s,6] y)"
_MASK = """
    u1 = Unsqueeze(mask, i1) u2 = Unsqueeze(u1, i2) uf = Cast <to = 1> (u2) us = Sub(one, uf) am = Mul(us, far)"""
_MASK_CONSTANTS = (
    ", int64[1] i1 = {1}, int64[1] i2 = {2}, float one = {1}, float[1] far = {-10000}, float[1] root = {2}"
)


def _bert() -> Iterator[PeerGraph]:
    keys = "kt = Transpose <perm = [0, 2, 3, 1]> (rk)"
    middle = f"{_NORM} {_PROJECTED} {keys} {_MASK} r = MatMul(q, kt) d = Div(r, root)"
    end = "p = Softmax <axis = 3> (a) o = MatMul(p, v)" + _OUT
    expected = {"attention": 1}
    feeds = {"mask": "b,s"}
    constants = _WEIGHTS + _MASK_CONSTANTS
    for name, add in (("BERT with a mask", "Add(d, am)"), ("BERT, sums reversed", "Add(am, d)")):
        text = _graph(_MASKED_HEAD, constants, f"{middle} a = {add} {end}")
        yield PeerGraph(f"onnxruntime: {name}", text, expected, feeds=feeds)
    dropped = middle + " a = Add(d, am) p0 = Softmax <axis = 3> (a) p = Dropout(p0) o = MatMul(p, v)" + _OUT
    yield PeerGraph(
        "onnxruntime: BERT with inference dropout", _graph(_MASKED_HEAD, constants, dropped), expected, feeds=feeds
    )
    hidden = f"""{_NORM} {_PROJECTED} {keys} zero64 = Cast <to = 7> (no) e = Equal(mask, zero64) u = Unsqueeze(e, front)
        sh = Shape(r) ex = Expand(u, sh) qd = Div(q, root) r = MatMul(qd, kt) a = Where(ex, low, r) {end}"""
    more = f"{constants}, int64[2] front = {{1, 2}}, float low = {{{LOWEST}}}, float no = {{0}}"
    body = hidden.replace(
        "sh = Shape(r) ex = Expand(u, sh) qd = Div(q, root) r = MatMul(qd, kt)",
        "qd = Div(q, root) r = MatMul(qd, kt) sh = Shape(r) ex = Expand(u, sh)",
    )
    yield PeerGraph("onnxruntime: DistilBERT", _graph(_MASKED_HEAD, more, body), expected, feeds=feeds)
    wide = _WEIGHTS.replace("float[6,8] wv", "float[6,10] wv").replace("float[8] bv", "float[10] bv")
    wide = wide.replace("float[8,6] wo", "float[10,6] wo").replace("flat = {0, 0, 8}", "flat = {0, 0, 10}")
    body = f"{middle} a = Add(d, am) {end}".replace("Reshape(av, heads)", "Reshape(av, wider)")
    text = _graph(_MASKED_HEAD, f"{wide}{_MASK_CONSTANTS}, int64[4] wider = {{0, 0, 2, 5}}", body)
    yield PeerGraph("onnxruntime: BERT with values of another width", text, expected, feeds=feeds)
    einsum = f"""{_NORM} q3 = Einsum <equation = "abc,cde->abde"> (n, w3)
        k3 = Einsum <equation = "abc,cde->abde"> (n, w4)
        v3 = Einsum <equation = "abc,cde->abde"> (n, w5) {_MASK} r = Einsum <equation = "aecd,abcd->acbe"> (k3, q3)
        d = Mul(r, half) a = Add(d, am) p = Softmax <axis = 3> (a) o = Einsum <equation = "acbe,aecd->abcd"> (p, v3)
        of = Reshape(o, flat) om = MatMul(of, wo) oa = Add(om, bo) t = Add(oa, n)
        y = LayerNormalization <axis = -1> (t, g, gb)"""
    three = ", ".join(f"float[6,2,4] w{index} = random" for index in (3, 4, 5))
    text = _graph(_MASKED_HEAD, f"{constants}, {three}, float half = {{0.5}}", einsum)
    yield PeerGraph("onnxruntime: BERT of tf2onnx, by Einsum", text, expected, feeds=feeds)


_TRIANGLE = ", ".join(map(str, np.tril(np.ones((8, 8), int)).reshape(-1)))


def _gpt2() -> Iterator[PeerGraph]:
    head = "float[b,s,6] x, float[2,b,2,p,4] past, int64[b,n] mask) => (float[b,s,6] y, float[2,b,2,n,4] present)"
    constants = (
        f"{_WEIGHTS}{_MASK_CONSTANTS}, uint8[1,1,8,8] tri = {{{_TRIANGLE}}}, int64[1] zero = {{0}},"
        "int64[1] by = {1},"
        "int64 at = {2}, int64[1] i3 = {3}, int64[2] halves = {1, 1}, float[6,24] w = random, float[24] wb = random,"
        "int64[3] parts = {8, 8, 8}"
    )
    body = f"""{_NORM} m = MatMul(n, w) a0 = Add(m, wb) qf, kf, vf = Split <axis = 2> (a0, parts)
        rq = Reshape(qf, heads) q = Transpose <perm = [0, 2, 1, 3]> (rq)
        rk = Reshape(kf, heads) k = Transpose <perm = [0, 2, 1, 3]> (rk)
        rv = Reshape(vf, heads) v0 = Transpose <perm = [0, 2, 1, 3]> (rv) {_PACKED_PAST}
        qs = Shape(q) ks = Shape(keys) nq = Gather(qs, at) nk = Gather(ks, at) ds = Sub(nk, nq)
        d1 = Unsqueeze(ds, zero) nk1 = Unsqueeze(nk, zero) tri1 = Slice(tri, d1, nk1, i2, by)
        tri2 = Slice(tri1, zero, nk1, i3, by) seen = Cast <to = 9> (tri2) {_MASK}
        kt = Transpose <perm = [0, 1, 3, 2]> (keys) r = MatMul(q, kt) d = Div(r, root) c = Where(seen, d, low)
        a = Add(c, am) p = Softmax <axis = 3> (a) o = MatMul(p, values) {_OUT}"""
    shapes = ({"b": 2, "s": 3, "p": 4, "n": 7}, {"b": 2, "s": 3, "p": 0, "n": 3}, {"b": 1, "s": 1, "p": 1, "n": 2})
    expected, feeds = {"attention": 1}, {"mask": "b,n"}
    least = constants.replace("far = {-10000}", f"far = {{{LOWEST}}}") + f", float low = {{{LOWEST}}}"
    yield PeerGraph(
        "onnxruntime: GPT-2 with past, masks by the lowest number",
        _graph(head, least, body),
        expected,
        "",
        feeds,
        shapes,
    )
    swapped = body.replace("Add(c, am)", "Add(am, c)")
    yield PeerGraph(
        "onnxruntime: GPT-2 with past, sums reversed", _graph(head, least, swapped), expected, "", feeds, shapes
    )
    low = constants + ", float low = {-10000}"
    reason = (
        "-1e4 takes the place of scores beside a mask: rows that see nothing would change; hidden_rows=any fuses it"
    )
    yield PeerGraph(
        "onnxruntime: GPT-2 with past, masks by -1e4", _graph(head, low, body), expected, reason, feeds, shapes
    )
    plain = body.replace(_PACKED_PAST, "keys = Identity(k) values = Identity(v0)")
    head = "float[b,s,6] x) => (float[b,s,6] y)"
    alone = plain.replace(_MASK, "").replace(
        "c = Where(seen, d, low)\n        a = Add(c, am)", "a = Where(seen, d, low)"
    )
    yield PeerGraph("onnxruntime: GPT-2 without past", _graph(head, low, alone), expected)
    megatron = body.replace("seen = Cast <to = 9> (tri2)", "seen = Cast <to = 1> (tri2)").replace(
        "c = Where(seen, d, low)", "ms = Mul(d, seen) si = Sub(one, seen) sl = Mul(si, low) c = Add(ms, sl)"
    )
    head = "float[b,s,6] x, float[2,b,2,p,4] past, int64[b,n] mask) => (float[b,s,6] y, float[2,b,2,n,4] present)"
    reason = "scores are multiplied by the causal mask; no operator does that"
    yield PeerGraph("onnxruntime: Megatron GPT-2", _graph(head, low, megatron), expected, reason, feeds, shapes)


_PACKED_PAST = """pk1, pv1 = Split <axis = 0> (past, halves) pk = Squeeze(pk1, zero) pv = Squeeze(pv1, zero)
        keys = Concat <axis = -2> (pk, k) values = Concat <axis = -2> (pv, v0)
        ku = Unsqueeze(keys, zero) vu = Unsqueeze(values, zero) present = Concat <axis = 0> (ku, vu)"""


#: Lengths that whisper computes: batch · heads, and the axes of scores and results.
_MERGED_LENGTHS = """
    sh = Shape(n) b0 = Gather(sh, at0) bh = Mul(b0, h0) bh1 = Unsqueeze(bh, zero)
    three = Concat <axis = 0> (bh1, minus, d1)
    s0 = Gather(sh, at1) b1 = Unsqueeze(b0, zero) s1 = Unsqueeze(s0, zero)
    four = Concat <axis = 0> (b1, h1, s1, d1) flat3 = Concat <axis = 0> (b1, s1, c1)"""
_MERGED_CONSTANTS = (
    ", int64 at0 = {0}, int64 at1 = {1}, int64 h0 = {2}, int64[1] h1 = {2}, int64[1] d1 = {4}, int64[1] c1 = {8},"
    "int64[1] minus = {-1}, int64[1] zero = {0}, int64[4] any = {0, -1, 2, 4}, float half = {0.5}"
)


def _whisper() -> Iterator[PeerGraph]:
    query = """mq = MatMul(n, wq) aq = Add(bq, mq) sq = Mul(aq, half) rq = Reshape(sq, heads)
        q4 = Transpose <perm = [0, 2, 1, 3]> (rq) q = Reshape(q4, three)"""
    keys = "mk = MatMul(n, wk) rk = Reshape(mk, any) k4 = Transpose <perm = [0, 2, 1, 3]> (rk)"
    values = "mv = MatMul(n, wv) av = Add(bv, mv) rv = Reshape(av, any) v4 = Transpose <perm = [0, 2, 1, 3]> (rv)"
    turned = "k = Reshape({0}, three) kt = Transpose <perm = [0, 2, 1]> (k) v = Reshape({1}, three) r = MatMul(q, kt)"
    end = """p = Softmax <axis = 2> (a) o3 = MatMul(p, v) o4 = Reshape(o3, four)
        ob = Transpose <perm = [0, 2, 1, 3]> (o4)
        of = Reshape(ob, flat3) om = MatMul(of, wo) oa = Add(bo, om) t = Add(x, oa)
        y = LayerNormalization <axis = -1> (t, g, gb)"""
    constants = _WEIGHTS + _MERGED_CONSTANTS
    expected = {"attention": 1}
    start = f"{_NORM} {_MERGED_LENGTHS} {query} {keys} {values}"
    body = f"{start} {turned.format('k4', 'v4')} a = Identity(r) {end}"
    yield PeerGraph("onnxruntime: whisper encoder", _graph(_HEAD, constants, body), {"attention": 1})
    masked = f"""{turned.format("k4", "v4")} ks = Shape(k) k0 = Gather(ks, at1) k1 = Unsqueeze(k0, zero)
        wide = Concat <axis = 0> (b1, h1, s1, k1) narrow = Concat <axis = 0> (bh1, s1, k1)
        r4 = Reshape(r, wide) a4 = Add(r4, mask) a = Reshape(a4, narrow)"""
    head = "float[b,s,6] x, float[b,1,s,s] mask) => (float[b,s,6] y, float[b,2,s,4] k4, float[b,2,s,4] v4)"
    yield PeerGraph("onnxruntime: whisper decoder", _graph(head, constants, f"{start} {masked} {end}"), expected)
    past = "kc = Concat <axis = 2> (pk, k4) vc = Concat <axis = 2> (pv, v4)"
    head = (
        "float[b,s,6] x, float[b,2,p,4] pk, float[b,2,p,4] pv)=> (float[b,s,6] y, float[b,2,n,4] kc, float[b,2,n,4] vc)"
    )
    shapes = ({"b": 2, "s": 1, "p": 4}, {"b": 2, "s": 3, "p": 0}, {"b": 1, "s": 1, "p": 1})
    body = f"{start} {past} {turned.format('kc', 'vc')} a = Identity(r) {end}"
    yield PeerGraph("onnxruntime: whisper decoder with past", _graph(head, constants, body), expected, shapes=shapes)
    head = "float[b,s,6] x, float[b,2,t,4] pk, float[b,2,t,4] pv) => (float[b,s,6] y)"
    body = f"{_NORM} {_MERGED_LENGTHS} {query} {turned.format('pk', 'pv')} a = Identity(r) {end}"
    shapes = ({"b": 2, "s": 1, "t": 4}, {"b": 2, "s": 3, "t": 1}, {"b": 1, "s": 1, "t": 1})
    yield PeerGraph(
        "onnxruntime: whisper cross-attention with past", _graph(head, constants, body), expected, shapes=shapes
    )


def _scaled() -> Iterator[PeerGraph]:
    head = "float[2,3,5,4] q, float[2,3,6,4] k, float[2,3,6,7] v{0}) => (float[2,3,5,7] y)"
    constants = "float c = {1.3}, float e = {0.7}, float zero = {0}"
    end = "p = Softmax <axis = -1> (a) bad = IsNaN(p) z = Where(bad, zero, p) y = MatMul(z, v)"
    turned = "kt = Transpose <perm = [0, 1, 3, 2]> (k)"
    spellings = {
        "both divided": f"{turned} x = Div(q, c) w = Div(kt, c) r = MatMul(x, w)",
        "both multiplied": f"{turned} x = Mul(q, e) w = Mul(kt, e) r = MatMul(x, w)",
        "by two numbers": f"{turned} x = Mul(q, e) w = Mul(kt, c) r = MatMul(x, w)",
        "keys divided before": "kc = Div(k, c) kt = Transpose <perm = [0, 1, 3, 2]> (kc) r = MatMul(q, kt)",
        "query alone": f"{turned} x = Div(q, c) r = MatMul(x, kt)",
        "scores divided": f"{turned} s = MatMul(q, kt) r = Div(s, c)",
        "scores multiplied": f"{turned} s = MatMul(q, kt) r = Mul(e, s)",
        "scores not scaled": f"{turned} r = MatMul(q, kt)",
    }
    for name, body in spellings.items():
        for masked, scores in (("", "a = Identity(r)"), (", masked", "a = Add(r, mask)")):
            inputs = head.format(", float[2,3,5,6] mask" if masked else "")
            text = _graph(inputs, constants, f"{body} {scores} {end}", 18)
            yield PeerGraph(f"onnxscript: sdpa, {name}{masked}", text, {"attention": 1}, shapes=({},))
    turned = "kt = Transpose <perm = [0, 2, 3, 1]> (k)"
    head = "float[2,3,5,4] q, float[2,6,3,4] k, float[2,3,6,7] v) => (float[2,3,5,7] y)"
    body = f"{turned} x = Div(q, c) w = Div(kt, c) a = MatMul(x, w) {end}"
    yield PeerGraph(
        "onnxscript: sdpa, keys [batch, seq, heads, d]",
        _graph(head, constants, body, 18),
        {"attention": 1},
        shapes=({},),
    )


def _dit() -> Iterator[PeerGraph]:
    constants = "float scale = {10}"
    end = "y = MatMul(p, v)"
    head = "float[b,3,s,4] q, float[b,3,4,s] kt, float[b,3,s,5] v) => (float[b,3,s,5] y)"
    body = f"r = MatMul(q, kt) a = Mul(r, scale) p = Softmax(a) {end}"
    yield PeerGraph("onnxruntime: DiT, keys as they are", _graph(head, constants, body), {"attention": 1})
    turned = head.replace("float[b,3,4,s] kt", "float[b,3,s,4] k")
    body = f"kt = Transpose <perm = [0, 1, 3, 2]> (k) {body}"
    yield PeerGraph("onnxruntime: DiT", _graph(turned, constants, body), {"attention": 1})
    half = turned.replace("float[b,3,s,5]", "float16[b,3,s,5]")
    wide = "r = MatMul(q, kt) rw = Cast <to = 1> (r) a = Mul(rw, scale) pw = Softmax(a) p = Cast <to = 10> (pw)"
    body = f"kt = Transpose <perm = [0, 1, 3, 2]> (k) {wide} {end}"
    yield PeerGraph("onnxruntime: DiT, values in fp16", _graph(half, constants, body), {"attention": 1})


def _others() -> Iterator[PeerGraph]:
    start = f"{_NORM} {_PROJECTED} kt = Transpose <perm = [0, 2, 3, 1]> (rk) r = MatMul(q, kt)"
    end = "p = Softmax(a) o = MatMul(p, v)" + _OUT
    expected = {"attention": 1}
    bias = ", float[1,2,s,s] bias) => (float[b,s,6] y)"
    text = _graph(_HEAD.replace(") => (float[b,s,6] y)", bias), _WEIGHTS, f"{start} a = Add(r, bias) {end}")
    yield PeerGraph("onnxruntime: T5, a bias by distance", text, expected)
    masked = f"{start} {_MASK} ab = Add(bias, am) a = Add(r, ab) {end}"
    text = _graph(_MASKED_HEAD.replace(") => (float[b,s,6] y)", bias), _WEIGHTS + _MASK_CONSTANTS, masked)
    yield PeerGraph("onnxruntime: T5, a bias by distance and a mask", text, expected, feeds={"mask": "b,s"})
    text = _graph(
        _HEAD.replace(") => (float[b,s,6] y)", bias),
        _WEIGHTS + ", float root = {2}",
        f"{start} rb = Add(r, bias) a = Div(rb, root) {end}",
    )
    yield PeerGraph("onnxruntime: Conformer, a bias before the scale", text, expected)
    both = f"""{_NORM} {_PROJECTED} kt = Transpose <perm = [0, 2, 3, 1]> (rk) qs = Mul(q, e) ks = Mul(kt, e)
        a = MatMul(qs, ks) {end}"""
    text = _graph(_HEAD, _WEIGHTS + ", float e = {0.7}", both)
    yield PeerGraph("onnxruntime: ViT", text, expected)
    cross = both.replace("mk = MatMul(n, wk)", "mk = MatMul(z, wk)").replace("mv = MatMul(n, wv)", "mv = MatMul(z, wv)")
    head = "float[b,s,6] x, float[b,t,6] z) => (float[b,s,6] y)"
    shapes = ({"b": 2, "s": 5, "t": 3}, {"b": 1, "s": 1, "t": 4}, {"b": 2, "s": 3, "t": 1})
    yield PeerGraph(
        "onnxruntime: BART cross-attention",
        _graph(head, _WEIGHTS + ", float e = {0.7}", cross),
        expected,
        shapes=shapes,
    )


_NUMBERS = (
    "float half = {0.5}, float one = {1}, float two = {2}, float three = {3}, float root = {1.4142135},"
    "float factor = {0.7978845608}, float cubic = {0.044715}, float alpha = {1.702}, float eps = {0.00001},"
    "float megatron = {1.41421}, float[6] g = random, float[6] gb = random, int64[1] last = {-1}"
)


def _gelus() -> Iterator[PeerGraph]:
    erf = "e = Erf(d) p = Add(e, one)"
    spellings = {
        "onnxruntime: Gelu of Hugging Face": f"d = Div(x, root) {erf} h = Mul(x, half) y = Mul(h, p)",
        "onnxscript: Gelu by erf": f"d = Div(x, root) {erf} m = Mul(x, p) y = Mul(half, m)",
        "onnxscript: Gelu by erf, halved within": f"d = Div(x, root) {erf} m = Mul(half, p) y = Mul(x, m)",
        "onnxruntime: Gelu of Megatron": f"d = Div(x, megatron) {erf} h = Mul(x, half) y = Mul(h, p)",
        "onnxruntime: FastGelu of Hugging Face": """h = Mul(half, x) f = Mul(x, factor) k = Mul(x, cubic) k2 = Mul(k, x)
            a = Add(one, k2) i = Mul(f, a) t = Tanh(i) p = Add(t, one) y = Mul(h, p)""",
        "onnxscript: Gelu by tanh": """c = Pow(x, three) k = Mul(cubic, c) a = Add(x, k) i = Mul(factor, a) t = Tanh(i)
            p = Add(t, one) h = Mul(half, p) y = Mul(x, h)""",
    }
    head = "float[b,s,6] x) => (float[b,s,6] y)"
    for name, body in spellings.items():
        yield PeerGraph(name, _graph(head, _NUMBERS, body, 18), {"gelu": 1})
    text = _graph(head, _NUMBERS, "a = Mul(alpha, x) s0 = Sigmoid(a) y = Mul(x, s0)", 18)
    yield PeerGraph("onnxruntime: QuickGelu", text, {"gelu": 1}, passes="fuse{opset=24}")


def _norms() -> Iterator[PeerGraph]:
    head = "float[b,s,6] x) => (float[b,s,6] y)"
    means = "m = ReduceMean(x, last) d = Sub(x, m) {0} v = ReduceMean(sq, last) ve = Add(v, eps) r = Sqrt(ve)"
    inverse = "i = Reciprocal(r) n = Mul(d, i)"
    spellings = {
        "onnxruntime: layer norm of PyTorch": "sq = Pow(d, two)|n = Div(d, r) f = Mul(n, g) y = Add(f, gb)",
        "onnxscript: layer norm without a bias": f"sq = Mul(d, d)|{inverse} y = Mul(n, g)",
        "onnxscript: layer norm with a bias": f"sq = Mul(d, d)|{inverse} f = Mul(n, g) y = Add(f, gb)",
        "onnxruntime: layer norm without a factor": "sq = Pow(d, two)|y = Div(d, r)",
    }
    for name, pair in spellings.items():
        square, _, rest = pair.partition("|")
        yield PeerGraph(name, _graph(head, _NUMBERS, f"{means.format(square)} {rest}", 18), {"layer norm": 1})
    keras = """m = ReduceMean(x, last) d = Sub(x, m) sq = Mul(d, d) v = ReduceMean(sq, last) ve = Add(v, eps)
        r = Sqrt(ve) i = Reciprocal(r) ig = Mul(i, g) xi = Mul(x, ig) mi = Mul(m, ig) bi = Sub(gb, mi)
        y = Add(xi, bi)"""
    yield PeerGraph("onnxruntime: layer norm of Keras", _graph(head, _NUMBERS, keras, 18), {"layer norm": 1})
    squares = "sq = Pow(x, two) v = ReduceMean(sq, last) ve = Add(v, eps) r = Sqrt(ve)"
    for name, rest in {
        "onnxscript: rms norm by a reciprocal": "i = Reciprocal(r) n = Mul(x, i) y = Mul(g, n)",
        "onnxruntime: rms norm by a quotient": "i = Div(one, r) n = Mul(x, i) y = Mul(n, g)",
        "onnxruntime: rms norm of T5": "n = Div(x, r) y = Mul(g, n)",
    }.items():
        yield PeerGraph(name, _graph(head, _NUMBERS, f"{squares} {rest}", 18), {"rms norm": 1})
    skip = "float[b,s,6] z, float[b,s,6] skip) => (float[b,s,6] y, float[b,s,6] x)"
    text = _graph(skip, _NUMBERS, f"x = Add(z, skip) {squares} n = Div(x, r) y = Mul(g, n)", 18)
    yield PeerGraph("onnxscript: rms norm of a skip connection", text, {"rms norm": 1})
    body = f"x = Add(z, skip) {means.format('sq = Pow(d, two)')} n = Div(d, r) f = Mul(n, g) y = Add(f, gb)"
    yield PeerGraph("onnxruntime: layer norm of a skip connection", _graph(skip, _NUMBERS, body, 18), {"layer norm": 1})


def _rotaries() -> Iterator[PeerGraph]:
    angles = """pf = Cast <to = 1> (ids) p3 = Unsqueeze(pf, i1) fr = MatMul(freq, p3)
        ft = Transpose <perm = [0, 2, 1]> (fr)
        w = Concat <axis = -1> (ft, ft) co = Cos(w) si = Sin(w) c = Unsqueeze(co, i1) s1 = Unsqueeze(si, i1)"""
    constants = (
        "float[1,4,1] freq = random, int64[1] i1 = {1}, int64[1] i0 = {0}, int64[1] half = {4}, int64[1] end = {99},"
        "int64[1] i3 = {3}, int64[1] width = {8}, int64[1] two = {2}, int64[1] minus = {-1}, int64[1] i2 = {2},"
        "int64[4] flat = {0, 0, 0, -1}"
    )
    head = "float[b,3,s,8] x, int64[b,s] ids) => (float[b,3,s,8] y)"
    turn = """lo = Slice({0}, i0, half, i3) hi = Slice({0}, half, end, i3) ne = Neg(hi) ro = Concat <axis = -1> (ne, lo)
        xc = Mul({0}, c) xs = Mul(ro, s1) {1} = Add(xc, xs)"""
    feeds = {"ids": "b,s"}
    text = _graph(head, constants, angles + turn.format("x", "y"), 18)
    yield PeerGraph("onnxscript: rotary", text, {"rotary": 1}, feeds=feeds)
    partial = f"{angles} front = Slice(x, i0, width, i3) rest = Slice(x, width, end, i3) {turn.format('front', 'tf')}"
    text = _graph(head.replace(",8]", ",11]"), constants, f"{partial} y = Concat <axis = -1> (tf, rest)", 18)
    yield PeerGraph("onnxscript: partial rotary", text, {"rotary": 1}, feeds=feeds)
    pairs = """pf = Cast <to = 1> (ids) p3 = Unsqueeze(pf, i1) fr = MatMul(freq, p3)
        ft = Transpose <perm = [0, 2, 1]> (fr)
        co = Cos(ft) si = Sin(ft) c = Unsqueeze(co, i1) s1 = Unsqueeze(si, i1)
        a = Slice(x, i0, end, i3, two) z = Slice(x, i1, end, i3, two) ac = Mul(a, c) zs = Mul(z, s1) e = Sub(ac, zs)
        as1 = Mul(a, s1) zc = Mul(z, c) o = Add(as1, zc) e1 = Unsqueeze(e, minus) o1 = Unsqueeze(o, minus)
        j = Concat <axis = -1> (e1, o1) y = Reshape(j, flat)"""
    reason = "channels are rotated in neighbouring pairs, of which no rule knows the spelling"
    yield PeerGraph(
        "GPT-J: rotary of neighbouring pairs", _graph(head, constants, pairs, 18), {"rotary": 1}, reason, feeds
    )


def peer_graphs() -> tuple[PeerGraph, ...]:
    """Return all graphs, in the order of the table."""
    makers = (_bert, _gpt2, _whisper, _dit, _others, _scaled, _gelus, _norms, _rotaries)
    return tuple(graph for maker in makers for graph in maker())
