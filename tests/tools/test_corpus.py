"""The corpus: every defect of a pass shows, nothing that is right counts as one, and a part of it runs here."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest

from passopt.passes.framework.accuracy import REASSOCIATED, lossy
from passopt.passes.framework.base import REGISTERED, Pass
from passopt.passes.framework.records import PassResult

CORPUS = Path(__file__).resolve().parents[2] / "tools" / "corpus"
NAMES = ("cases", "comparison", "dtypes", "engines", "outcomes", "table", "variants", "workers")
#: Operators whose models run in the quick part: shapes as values, casts, constants of every kind, bodies, texts.
OPERATORS = ("gather", "castlike", "expand", "softmax", "where")


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(CORPUS))
    modules = {name: importlib.import_module(name) for name in NAMES}
    yield type("Corpus", (), modules)
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def case(corpus: Any) -> Any:
    text = """<ir_version: 10, opset_import: ["" : 18]>
        g (float[2,3] x, float[3] w) => (float[2,3] y) { s = Add(x, w) y = Relu(s) }"""
    feeds = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "w": np.array([1, -2, 3], np.float32)}
    return corpus.cases.Case("sums", onnx.parser.parse_model(text), feeds)


def outcomes(corpus: Any, case: Any, step: str, folder: Path, variant: str = "plain") -> dict[str, Any]:
    written = corpus.variants.VARIANTS[variant](case)
    return {name: take() for name, take in corpus.outcomes.Subject(case, written, folder).steps([step])}


def faulty(name: str, run: Any) -> str:
    """Register a pass that changes models by `run`, and return its name."""
    # Not by a class statement, because that would register it for all tests under the name of this function.
    made = type("Faulty", (Pass,), {"name": name, "run": run, "__doc__": "Do harm."})
    REGISTERED[name] = dataclasses.dataclass(frozen=True)(made)
    return name


def swapped(operator: str) -> Any:
    def run(self: Pass, model: onnx_ir.Model) -> PassResult:
        node = next(iter(model.graph))
        changed = node.op_type != operator
        node.op_type = operator
        return PassResult(modified=changed, matches=int(changed))

    return run


def raising(error: Exception) -> Any:
    def run(self: Pass, model: onnx_ir.Model) -> PassResult:
        raise error

    return run


def renaming(self: Pass, model: onnx_ir.Model) -> PassResult:
    node = next(iter(model.graph))
    node.outputs[0].name = f"{node.outputs[0].name}_"
    return PassResult(modified=True, matches=1)


@pytest.mark.parametrize(
    ("run", "kind"),
    [
        (swapped("Add"), "unchanged"),
        (swapped("Mul"), "wrong"),
        (swapped("Sum"), "ok"),
        (swapped("BitwiseAnd"), "invalid"),
        (raising(KeyError("axis")), "crash"),
        (renaming, "unstable"),
    ],
)
def test_every_kind_of_defect_shows(corpus: Any, case: Any, tmp_path: Path, run: Any, kind: str) -> None:
    step = faulty("corpus-fault", run)
    try:
        corpus.outcomes._PIPELINES.clear()
        assert outcomes(corpus, case, step, tmp_path)[step].kind == kind
    finally:
        del REGISTERED[step]


@pytest.mark.parametrize(
    ("operator", "added", "kind"),
    [
        ("Relu", 0.01, "ok"),
        ("Relu", 0.5, "beyond"),
        ("Relu", 3.0, "wrong"),
        ("Floor", 1000.0, "beyond"),  # an operator that jumps makes any error of any other
    ],
)
def test_a_lossy_pass_may_not_lose_anything(
    corpus: Any, case: Any, tmp_path: Path, operator: str, added: float, kind: str
) -> None:
    def run(self: Pass, model: onnx_ir.Model) -> PassResult:
        weight = model.graph.initializers["w"]
        if "lost" in weight.metadata_props:
            return PassResult(modified=False, matches=0)
        weight.metadata_props["lost"] = "yes"
        weight.const_value = onnx_ir.tensor(weight.const_value.numpy() + np.float32(added), name="w")
        return PassResult(modified=True, matches=1)

    next(node for node in case.model.graph.node if node.op_type == "Relu").op_type = operator
    step = faulty("corpus-fault", run)
    type.__setattr__(REGISTERED[step], "accuracy", lossy(0.02))
    try:
        corpus.outcomes._PIPELINES.clear()
        assert outcomes(corpus, case, step, tmp_path, "parameters")[step].kind == kind
    finally:
        del REGISTERED[step]


@pytest.mark.parametrize(
    ("large", "kind"),
    [
        (70_000.0, "ok"),  # fp16 holds infinity for it
        (1000.0, "wrong"),  # and this number for this
    ],
)
def test_a_number_that_fp16_does_not_hold_may_become_infinite(
    corpus: Any, case: Any, tmp_path: Path, large: float, kind: str
) -> None:
    model = case.model
    result = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]>
        g (float16[2,3] x, float16[3] w) => (float16[2,3] y) <float16 zero = {0}> { s = Add(x, w) y = Div(s, zero) }"""
    )
    feeds = {"x": np.full((2, 3), large, np.float32), "w": np.zeros(3, np.float32)}
    made = corpus.cases.Case("large", model, feeds)
    path, changed = tmp_path / "original.onnx", tmp_path / "result.onnx"
    onnx.save_model(model, path)
    onnx.save_model(result, changed)
    comparison = corpus.comparison.Comparison(made, corpus.variants.VARIANTS["plain"](made), path)
    found = comparison.outcome(corpus.comparison.Result(changed, lossy(0.02), changes_interface=True))
    assert found.kind == kind


def test_what_rounding_every_number_loses_a_cast_may_lose(corpus: Any, tmp_path: Path) -> None:
    """A difference of numbers near 1000 has nothing left in 16 bits; no constant or input need be inexact for that."""
    text = """<ir_version: 10, opset_import: ["" : 18]> g (float[3] x) => (float[3] y)
        <float a = {1000.0}> { s = Add(x, a) y = Sub(s, a) }"""
    made = corpus.cases.Case("cancelled", onnx.parser.parse_model(text), {"x": np.array([0.11, 0.27, 0.4], np.float32)})
    assert outcomes(corpus, made, "cast{dtype=bf16}", tmp_path)["cast{dtype=bf16}"].kind == "beyond"


def test_the_reference_adds_bf16_up_in_fp32(corpus: Any, tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 18]> g (bfloat16[n] x) => (bfloat16[1] y) { y = ReduceSum(x) }"""
    path = tmp_path / "sum.onnx"
    onnx.save_model(onnx.parser.parse_model(text), path)
    ones = np.ones(1000, onnx_ir.DataType.BFLOAT16.numpy())
    assert float(corpus.engines.Evaluator(path).run({"x": ones})[0].astype(np.float32).item()) == 1000


def test_an_attention_of_an_empty_query_is_judged_by_its_elementary_form(corpus: Any, tmp_path: Path) -> None:
    """No engine has a kernel for it, while the graph that was fused had an answer: an empty one."""
    text = """<ir_version: 10, opset_import: ["" : 23]>
        g (float[b,2,s,4] q, float[b,2,s,4] k, float[b,2,s,4] v) => (float[b,2,s,4] y) {%s}"""
    products = "kt = Transpose<perm = [0,1,3,2]>(k) s = MatMul(q, kt) p = Softmax<axis = -1>(s) y = MatMul(p, v)"
    attention = "y = Attention<scale = 1.0>(q, k, v)"
    original, result = tmp_path / "original.onnx", tmp_path / "result.onnx"
    model = onnx.parser.parse_model(text % products)
    onnx.save_model(model, original)
    onnx.save_model(onnx.parser.parse_model(text % attention), result)
    feeds = [{name: np.ones((1, 2, length, 4), np.float32) for name in "qkv"} for length in (3, 0)]
    case = corpus.cases.Case("attention", model, feeds[0])
    comparison = corpus.comparison.Comparison(case, corpus.variants.Written(model, feeds), original)
    assert comparison.outcome(corpus.comparison.Result(result, REASSOCIATED, changes_interface=False)).kind == "ok"


@pytest.mark.parametrize(("agrees", "kind"), [(True, "ok"), (False, "wrong"), (None, "wrong")])
def test_where_engines_differ_on_the_original_the_reference_decides(
    corpus: Any, case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agrees: bool | None, kind: str
) -> None:
    """And where the reference does not run the result, it stays wrong."""

    class Reference:
        name = "reference"

        def __init__(self, path: Path) -> None:
            self.is_result = "result" in str(path)
            if self.is_result and agrees is None:
                raise corpus.engines.Refused("no such operator", lacks_kernel=True)

        def run(self, feeds: Any) -> list[Any]:
            return [np.full((2, 3), 7 if agrees or not self.is_result else 8, np.float32)]

    monkeypatch.setattr(corpus.comparison, "Evaluator", Reference)
    step = faulty("corpus-fault", swapped("Mul"))
    try:
        corpus.outcomes._PIPELINES.clear()
        assert outcomes(corpus, case, step, tmp_path)[step].kind == kind
    finally:
        del REGISTERED[step]


def test_a_refusal_is_none(corpus: Any, case: Any, tmp_path: Path) -> None:
    found = outcomes(corpus, case, "int8", tmp_path)["int8"]
    assert (found.kind, "quantize-weights" in found.detail) == ("refused", True)


@pytest.mark.parametrize(
    "variant", ["plain", "symbolic", "constants", "parameters", "body", "external", "function", "alias"]
)
def test_variants_compute_the_same(corpus: Any, case: Any, tmp_path: Path, variant: str) -> None:
    written = corpus.variants.VARIANTS[variant](case)
    subject = corpus.outcomes.Subject(case, written, tmp_path)
    if variant != "alias":  # ONNX's checker takes the alias in imports only, onnxruntime everywhere
        onnx.checker.check_model(str(subject.path), full_check=True)
    expected = np.maximum(case.feeds["x"] + case.feeds["w"], 0)
    (_, (found,)) = subject.comparison.computed(corpus.engines.Runtime)[0]
    assert np.array_equal(found, expected)


def test_symbolic_lengths_are_fed_other_lengths(corpus: Any, case: Any) -> None:
    shapes = {feeds["x"].shape for feeds in corpus.variants.symbolic(case).feeds}
    assert {(2, 3), (2, 4), (2, 1), (2, 0), (0, 3), (1, 3)} <= shapes


def test_what_differs(corpus: Any) -> None:
    from passopt.passes.framework.accuracy import EXACT

    def text(one: Any, other: Any) -> str:
        return str(corpus.engines.difference([one], [other], EXACT, is_random=False))

    ones = np.ones((2, 3), np.float32)
    assert text(ones, ones.copy()) == ""
    assert text(np.array([np.nan, np.inf]), np.array([np.nan, np.inf])) == ""
    assert "dtype float32 became float64" in text(ones, ones.astype(np.float64))
    assert "shape (2, 3) became (3, 2)" in text(ones, ones.T)
    assert "error 1.0e+00" in text(ones, ones * 2)
    assert "texts" in text(np.array(["a"]), np.array(["b"]))
    assert "2 outputs became 1" in text([ones, ones], [ones])
    assert "NoneType" in text(None, ones)


def test_a_model_is_sensitive_where_one_rounding_of_its_inputs_does_more_than_a_pass(corpus: Any) -> None:
    from passopt.passes.framework.accuracy import REASSOCIATED

    class Session:
        def run(self, feeds: Any) -> Any:
            return [(feeds["x"] - np.float32(1)) * np.float32(1e6)]

    feeds = {"x": np.array([1.001], np.float32)}
    moved = corpus.engines.movement(Session(), feeds, outputs := Session().run(feeds))
    assert 5e-5 < moved < 5e-4

    def text(change: float) -> str:
        found = [outputs[0] * np.float32(1 + change)]
        return str(corpus.engines.difference(outputs, found, REASSOCIATED, is_random=False, moved=moved))

    assert text(5e-5) == ""
    assert "error 1.0e-02" in text(1e-2)


def test_a_variant_that_is_read_as_another_one_shares_its_outcomes(
    corpus: Any, case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    original = corpus.outcomes.Subject._passes
    monkeypatch.setattr(
        corpus.outcomes.Subject,
        "_passes",
        lambda self, passes, name, model: taken.append(name) or original(self, passes, name, model),
    )
    memory: dict[Any, Any] = {}
    kinds = []
    for variant in ("plain", "alias", "body"):
        (folder := tmp_path / variant).mkdir()
        written = corpus.variants.VARIANTS[variant](case)
        steps = corpus.outcomes.Subject(case, written, folder, memory).steps(["(save)", "cse"])
        kinds.append([take().kind for _, take in steps])
    assert kinds == [["ok", kinds[0][1]]] * 2 + [["ok", kinds[2][1]]]
    assert taken == ["(save)", "cse", "(save)", "(save)", "cse"]


def test_a_process_that_dies_or_hangs_is_an_outcome(
    corpus: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, sys, time\n"
        "options = json.load(sys.stdin)\n"
        "for step in ('ends', 'stays', 'works'):\n"
        "    if ['case', 'plain', step] in options['skip']: continue\n"
        "    print(json.dumps({'at': ['case', 'plain', step]}), flush=True)\n"
        "    if step == 'ends': sys.exit('gone')\n"
        "    if step == 'stays': time.sleep(60)\n"
        "print(json.dumps({'done': ['case', 'plain'], 'outcomes': {'works': ['ok', '']}}), flush=True)\n"
    )
    monkeypatch.setattr(corpus.workers, "HERE", tmp_path)
    monkeypatch.setattr(corpus.workers, "STEP_LIMIT", 0.3)
    rows = list(corpus.workers.run_all({"only": ["longer than an argument may be"] * 10_000}, 1))
    assert rows == [
        ("case", "plain", "ends", "hang", "exit code 1: gone"),
        ("case", "plain", "stays", "hang", "no answer within 0 s"),
        ("case", "plain", "works", "ok", ""),
    ]


def test_the_table_and_the_list_of_faults(corpus: Any) -> None:
    rows = [
        ("one", "plain", "cse", "ok", ""),
        ("two", "plain", "cse", "crash", "VerifyError: cse: Add 'a' is broken (passes before it: none)"),
        ("three", "body", "cse", "crash", "VerifyError: cse: Add 'b' is broken (passes before it: none)"),
    ]
    assert corpus.table.table(rows).splitlines()[2] == "| cse | 1 | 2 |"
    listed = corpus.table.faults(rows)
    assert listed.splitlines()[0] == "crash × 2: VerifyError: Add '…' is broken"
    assert "two/plain, three/body" in listed


def part(corpus: ModuleType, cases: list[Any], variants: list[str], steps: list[str], folder: Path) -> list[Any]:
    """Run steps over cases in this process, and return the outcomes that are defects."""
    found = []
    for number, (case, variant) in enumerate((case, variant) for case in cases for variant in variants):
        written = corpus.variants.VARIANTS[variant](case)
        if written is None:
            continue
        (inner := folder / str(number)).mkdir()
        for step, take in corpus.outcomes.Subject(case, written, inner).steps(steps):
            outcome = take()
            if outcome.kind in corpus.outcomes.FAULTS:
                found.append((case.name, variant, step, outcome))
    return found


def test_a_small_part_has_no_faults(corpus: Any, tmp_path: Path) -> None:
    cases = corpus.cases.backend_cases(OPERATORS)
    steps = ["(save)", "(text)", "fold-constants,canonicalize,fold-constants,cse,dead-code", "inline-functions"]
    chosen = corpus.cases.chosen(cases, [], "1/12")
    assert len(chosen) > 3
    assert part(corpus, chosen, ["plain", "constants", "function"], steps, tmp_path) == []


@pytest.mark.slow
def test_a_part_of_the_corpus_has_no_faults() -> None:
    command = [sys.executable, str(CORPUS), "--part", "1/150", "--workers", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = json.loads(done.stdout)
    assert len({row[0] for row in rows}) > 8
    assert [row for row in rows if row[3] in {"unstable", "wrong", "invalid", "crash", "hang"}] == []
    assert done.returncode == 0


def test_a_step_of_an_unknown_name_is_refused_before_anything_runs() -> None:
    command = [sys.executable, str(CORPUS), "--passes", "fold-constant"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean 'fold-constants'" in done.stderr
