"""Run one candidate on one task of `rewriting/bench.py`, and print its CPU time, matches and peak memory as JSON.

    python tools/bench/rewriting/candidates.py CANDIDATE TASK MODEL REPEATS

The patterns are written once, and both passopt and onnxscript's rewriter use them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SQRT_2 = 1.4142135623730951


# Patterns. Their `op` comes from passopt or from onnxscript, which build patterns in the same way.


def rms_norm(op: Any, x: Any, w: Any, eps: Any) -> Any:
    """Return the pattern w · (x · (1 / √(mean(x²) + eps)))."""
    mean = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1)
    return op.Mul(w, op.Mul(x, op.Div(1.0, op.Sqrt(op.Add(mean, eps)))))


def silu(op: Any, x: Any) -> Any:
    """Return the pattern x · sigmoid(x)."""
    return op.Mul(x, op.Sigmoid(x))


def attention(op: Any, q: Any, k: Any, v: Any, scale: Any, mask: Any, low: Any) -> Any:
    """Return the pattern softmax(max(q · kᵀ / scale + mask, low)) · v."""
    scores = op.Div(op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])), scale)
    return op.MatMul(op.Softmax(op.Max(op.Add(scores, mask), low), axis=-1), v)


def layer_norm(op: Any, x: Any, mean: Any, w: Any, b: Any, eps: Any) -> Any:
    """Return the pattern (x - mean) / √(mean((x - mean)²) + eps) · w + b."""
    centred = op.Sub(x, mean)
    variance = op.ReduceMean(op.Pow(centred, 2.0), [-1], keepdims=1)
    return op.Add(op.Mul(op.Div(centred, op.Sqrt(op.Add(variance, eps))), w), b)


def rms_norm_by_division(op: Any, x: Any, w: Any, eps: Any) -> Any:
    """Return the pattern x / √(mean(x²) + eps) · w."""
    mean = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1)
    return op.Mul(op.Div(x, op.Sqrt(op.Add(mean, eps))), w)


def gelu_erf(op: Any, x: Any) -> Any:
    """Return the pattern of GELU by the error function."""
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, SQRT_2)), 1.0)), 0.5)


def gelu_tanh(op: Any, x: Any, a: Any, b: Any) -> Any:
    """Return the pattern of GELU by its approximation with tanh."""
    inner = op.Mul(op.Add(x, op.Mul(op.Pow(x, 3.0), a)), b)
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(inner), 1.0))


def plain_attention(op: Any, q: Any, k: Any, v: Any, scale: Any, mask: Any) -> Any:
    """Return the pattern softmax(q · kᵀ · scale + mask) · v."""
    scores = op.Mul(op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])), scale)
    return op.MatMul(op.Softmax(op.Add(scores, mask), axis=-1), v)


def softmax_by_hand(op: Any, x: Any) -> Any:
    """Return the pattern exp(x) / sum(exp(x))."""
    power = op.Exp(x)
    return op.Div(power, op.ReduceSum(power, [-1], keepdims=1))


#: Patterns that match nowhere in the graphs of this benchmark.
MISSES: tuple[Callable[..., Any], ...] = (
    layer_norm,
    rms_norm_by_division,
    gelu_erf,
    gelu_tanh,
    plain_attention,
    softmax_by_hand,
    lambda op, x: op.Mul(x, op.Sigmoid(op.Mul(x, 1.702))),
    lambda op, x, w, b: op.Add(op.Conv(x, w), b),
    lambda op, x, s, t: op.Reshape(op.Reshape(x, s), t),
    lambda op, x, a: op.Squeeze(op.Unsqueeze(x, a), a),
    lambda op, x: op.Transpose(op.Neg(x), perm=[0, 2, 1, 3]),
    lambda op, x: op.Mul(x, 1.0),
    lambda op, x: op.Add(x, 0.0),
    lambda op, x: op.Div(x, 1.0),
    lambda op, x: op.Pow(x, 1.0),
    lambda op, x: op.Neg(op.Neg(x)),
    lambda op, x: op.Log(op.Exp(x)),
    lambda op, x: op.Cast(op.Cast(x, to=1), to=10),
    lambda op, x, a, b: op.Where(op.Equal(x, 0.0), a, b),
    lambda op, x, y: op.Mul(op.Concat(op.Neg(x), y, axis=-1), op.Sigmoid(y)),
)


def _never(op: Any) -> Any:
    raise AssertionError("a pattern that was to miss has matched")


class Rule(NamedTuple):
    """A pattern, and the function that builds its replacement."""

    pattern: Callable[..., Any]
    rewrite: Callable[..., Any]


def rules_of(task: str, number: Callable[[Any], float]) -> list[Rule]:
    """Return the rules of a task; replacements read constants by `number`, which differs between rewriters."""

    def to_rms_norm(op: Any, x: Any, w: Any, eps: Any) -> Any:
        return op.RMSNormalization(x, w, axis=-1, epsilon=number(eps))

    def to_attention(op: Any, q: Any, k: Any, v: Any, scale: Any, mask: Any, low: Any) -> Any:
        return op.Attention(q, k, v, mask, scale=1 / number(scale))

    def to_swish(op: Any, x: Any) -> Any:
        return op.Swish(x)

    known = {
        "rms-norm": Rule(rms_norm, to_rms_norm),
        "silu": Rule(silu, to_swish),
        "attention": Rule(attention, to_attention),
    }
    if task == "misses":
        return [Rule(pattern, _never) for pattern in MISSES]
    return list(known.values()) if task == "all-three" else [known[task]]


# Candidates. Each returns two functions: one loads the model, the other transforms it and returns what it changed.

Candidate = tuple[Callable[[str], Any], Callable[[Any], Any]]


def passopt_rules(task: str) -> Candidate:
    """Return the rules of a task in passopt, which count matches."""
    from passopt.ir.serialization.model_files import load_model
    from passopt.ir.weights.lazy_weight import small_constant
    from passopt.passes.patterns.rewrite_pass import RewritePass

    def number(value: Any) -> float:
        array = small_constant(value)
        assert array is not None
        return float(array)

    rules = rules_of(task, number)

    class Benchmark(RewritePass):
        name = "benchmark"

        def rules(self) -> Any:
            return rules

    return load_model, lambda model: Benchmark().run(model).matches


def onnxscript_rules(task: str, *, commute: bool) -> Candidate:
    """Return the rules of a task in onnxscript; with `commute`, they match inputs in either order as passopt does."""
    import onnx_ir
    from onnxscript.rewriter import RewriteRule, RewriteRuleSet

    def number(value: Any) -> float:
        tensor = onnx_ir.convenience.get_const_tensor(value)
        assert tensor is not None
        return float(tensor.numpy())

    rules = rules_of(task, number)

    def run(model: Any) -> int:
        return int(RewriteRuleSet([RewriteRule(*rule) for rule in rules], commute=commute).apply_to_model(model))

    return onnx_ir.load, run


def passopt_pass(task: str) -> Candidate:
    """Return the passopt pass called `task`, which counts the nodes that it removed."""
    from passopt.ir.serialization.model_files import load_model
    from passopt.passes.framework.catalog import pass_class

    def run(model: Any) -> int:
        before = len(model.graph)
        pass_class(task)().run(model)
        return before - len(model.graph)

    return load_model, run


def onnx_ir_pass(task: str) -> Candidate:
    """Return the onnx-ir pass that does the same as passopt's `task`, and counts the nodes that it removed."""
    import onnx_ir
    from onnx_ir.passes import common

    item = {"cse": common.CommonSubexpressionEliminationPass, "dead-code": common.RemoveUnusedNodesPass}[task]

    def run(model: Any) -> int:
        before = len(model.graph)
        item()(model)
        return before - len(model.graph)

    return onnx_ir.load, run


def passopt_pipeline(task: str) -> Candidate:
    """Return the pipeline called `task`, with the structure check after every pass; it counts matches by pass."""
    from passopt.ir.serialization.model_files import load_model
    from passopt.passes.pipeline.runner import run_passes
    from passopt.passes.pipeline.text import resolve

    passes = resolve(task).passes

    def run(model: Any) -> dict[str, Any]:
        return {record.name: record.result.matches for record in run_passes(model, passes)}

    return load_model, run


def transformers_optimizer(task: str) -> Candidate:
    """Return onnxruntime's own fusions, which are written in Python and count what they fused.

    They load the file themselves, weights included, so their time contains the loading.
    """
    from onnxruntime.transformers.optimizer import optimize_model

    def run(path: str) -> Any:
        optimized = optimize_model(path, model_type="gpt2", num_heads=2, hidden_size=256, opt_level=0)
        return {name: count for name, count in optimized.get_fused_operator_statistics().items() if count}

    return str, run


def simplifier(task: str) -> Candidate:
    """Return onnxsim, which counts the nodes that it removed; it loads the file itself, so its time contains that."""
    import onnx
    import onnxsim

    def run(path: str) -> int:
        simplified, _ = onnxsim.simplify(path)
        return len(onnx.load(path, load_external_data=False).graph.node) - len(simplified.graph.node)

    return str, run


CANDIDATES: dict[str, Callable[[str], Candidate]] = {
    "passopt": passopt_rules,
    "onnxscript": lambda task: onnxscript_rules(task, commute=False),
    "onnxscript, commuted": lambda task: onnxscript_rules(task, commute=True),
    "passopt pass": passopt_pass,
    "onnx-ir pass": onnx_ir_pass,
    "passopt pipeline": passopt_pipeline,
    "onnxruntime.transformers": transformers_optimizer,
    "onnxsim": simplifier,
}


def main(candidate: str, task: str, model: str, repeats: int) -> None:
    """Load and transform the model `repeats` times, and print the lowest CPU time, the findings and the memory."""
    load, run = CANDIDATES[candidate](task)
    times = []
    for _ in range(repeats):
        loaded = load(model)
        start = time.process_time()
        found = run(loaded)
        times.append(1000 * (time.process_time() - start))
    print(json.dumps({"ms": min(times), "found": found, "mib": peak_memory()}))


def peak_memory() -> float:
    """Return the peak resident MiB of this process; getrusage would count what its parent held at the start."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
