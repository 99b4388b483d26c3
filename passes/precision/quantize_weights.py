"""Define the pass `quantize-weights`, which stores weights as int8 codes and dequantises them in the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import onnx_ir

from passopt.ir.calibration.calibration import Calibration
from passopt.ir.dtypes import MODEL_FLOATS, OPSET_OF_HALF_SCALES, OPSET_OF_SCALES_PER_CHANNEL
from passopt.ir.errors import CalibrationError, PassError
from passopt.ir.graph.editor import Editor
from passopt.ir.graph.lm_head import is_head
from passopt.ir.graph.provenance import called
from passopt.ir.weights.dequantized import own_codes
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.lazy_weight import is_checkpoint_weight
from passopt.passes.framework.accuracy import QualityBar, lossy
from passopt.passes.framework.base import Decline
from passopt.passes.framework.records import PassResult
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.patterns.rules import Rewriter
from passopt.passes.precision.inline_weights import content_of, inline_weights_as_lazy
from passopt.passes.precision.stored_codes import holds_codes, stored_codes

#: The dtypes that DequantizeLinear takes as scales. Weights of other dtypes, such as double, stay as they are.
_LINEARS = frozenset({"MatMul", "Gemm"})


@dataclasses.dataclass(frozen=True)
class QuantizeWeights(RewritePass):
    """Store linear weights as int8 codes with one scale per output channel (absmax/127, symmetric): a quarter of fp32.

    Before: ``y = MatMul(x, Transpose(w))``, w [out, in]
    After:  ``y = MatMul(x, Transpose(DequantizeLinear(w.codes, w.scales, axis=0)))``
    A weight [in, out] of a MatMul, and the weight of a Gemm, whose bias becomes an Add, are stored in the same way:
    codes are always [out, in]. Embedding and head stay as they are unless the options include them. An embedding
    becomes ``Gather(codes) · Gather(scales)``, since a table behind a DequantizeLinear would be dequantised whole at
    every step. Weights inside of model.onnx, in Constant nodes and behind Identity, Cast or Transpose are quantised
    like those of a checkpoint, and a weight that several linears share is stored once.
    With `from`, codes and scales are those that `passopt calibrate` wrote to this folder; an embedding that it does not
    hold is rounded to the nearest. A weight that was quantised elsewhere, before it was exported, keeps its own codes;
    `method=stored` quantises such weights only, embedding and head included.
    """

    name = "quantize-weights"
    after = ("fold-norm-head", "split-packed-qkv", "rotate-residual", "smooth")
    #: A code is off by at most 1/254 of its channel's largest weight; a product with normally distributed weights is
    #: off by about 1 %.
    #: A trained model of 135M parameters, which suffers more than large ones: KL 0.003, 0.019 at 99 %, top-1 0.97.
    accuracy = lossy(2e-2, bar=QualityBar(kl=0.01, kl99=0.06, top1=0.94))

    embedding: bool = False
    head: bool = False
    method: Literal["auto", "rtn", "mse", "gptq", "stored"] = "auto"
    from_: str = ""

    def run(self, model: onnx_ir.Model) -> PassResult:
        """Quantise weights in place; raise PassError if the opset does not allow scales in the dtype of the weights."""
        self._check_method()
        with inline_weights_as_lazy(Editor(model, self.name)):
            self._check_opset(model)
            return super().run(model)

    def _check_method(self) -> None:
        """Raise CalibrationError if codes of the method have to be calibrated, and there are none."""
        if not self.from_ and self.method in {"gptq", "mse"}:
            options = "--data FILE" if self.method == "gptq" else "--method mse --collect codes"
            raise CalibrationError(
                f"{self.name}: method={self.method} needs codes that were calibrated. Make them: passopt calibrate "
                f"MODEL {options} -o CALIB; then quantise with int8{{from=CALIB}}"
            )
        if self.from_:
            made = {item.method for entry in Calibration.of(self.from_).weights.values() for item in entry.codes}
            if self.method != "auto" and made and self.method not in made:
                raise CalibrationError(
                    f"{self.name}: the codes of {self.from_} are of the method {', '.join(sorted(made))}, not of "
                    f"{self.method}"
                )

    def _check_opset(self, model: onnx_ir.Model) -> None:
        """Raise PassError if DequantizeLinear of the model's opset does not take scales in the weights' dtype."""
        opset = model.graph.opset_imports.get("", 0)
        half = [v.name for v in model.graph.initializers.values() if is_checkpoint_weight(v) and _is_half(v.dtype)]
        if half and opset < OPSET_OF_HALF_SCALES:
            raise PassError(
                f"{self.name}: {half[0]} and {len(half) - 1} more weights are 16-bit; DequantizeLinear takes such "
                f"scales from opset {OPSET_OF_HALF_SCALES} on, this model has {opset}. Run legalize first."
            )

    def rules(self) -> Sequence[tuple[Any, Any]]:
        """Return one rule for each way in which a graph reads a weight."""
        return [
            (self.transposed, self.rewrite_transposed),
            (self.direct, self.rewrite_direct),
            (self.gemm, self.rewrite_gemm),
            (self.gemm_with_bias, self.rewrite_gemm_with_bias),
            (self.looked_up, self.rewrite_looked_up),
        ]

    def transposed(self, op: Any, w: Any) -> Any:
        """Match a weight as the checkpoint holds it, [out, in]."""
        return op.Transpose(op.weight(w), perm=[1, 0], bind="turned")

    def rewrite_transposed(self, op: Rewriter, w: Any, turned: Any) -> Any:
        """Transpose the dequantised codes instead of the weight."""
        weight = self._linear_weight(op, w, turned, is_turned=False)
        return op.Transpose(self._dequantized(op, w.name, weight), perm=[1, 0])

    def direct(self, op: Any, x: Any, w: Any) -> Any:
        """Match a weight that was transposed before, [in, out]."""
        return op.MatMul(x, op.weight(w))

    def rewrite_direct(self, op: Rewriter, x: Any, w: Any) -> Any:
        """Store the weight as codes [out, in], and transpose them in the graph."""
        return self._product(op, x, w, is_turned=False)

    def gemm(self, op: Any, x: Any, w: Any, turned: Any) -> Any:
        """Match a Gemm without a bias."""
        return op.Gemm(x, op.weight(w), transB=turned, bind="linear")

    def gemm_with_bias(self, op: Any, x: Any, w: Any, bias: Any, turned: Any) -> Any:
        """Match a Gemm with a bias."""
        return op.Gemm(x, op.weight(w), bias, transB=turned, bind="linear")

    def rewrite_gemm(self, op: Rewriter, x: Any, w: Any, turned: Any, linear: Any) -> Any:
        """Write the Gemm as a MatMul, for whose quantised form onnxruntime has a kernel."""
        node = linear.producer()
        factors = {name: node.attributes[name].value for name in ("alpha", "beta", "transA") if name in node.attributes}
        if factors.get("transA", 0) or factors.get("alpha", 1) != 1 or factors.get("beta", 1) != 1:
            raise Decline(f"{called(node)} is no plain linear: expected alpha 1, beta 1 and transA 0, found {factors}")
        return self._product(op, x, w, is_turned=bool(turned))

    def rewrite_gemm_with_bias(self, op: Rewriter, x: Any, w: Any, turned: Any, linear: Any, bias: Any) -> Any:
        """Write the Gemm as a MatMul and an Add."""
        return op.Add(self.rewrite_gemm(op, x, w, turned, linear), bias)

    def _product(self, op: Any, x: Any, w: Any, *, is_turned: bool) -> Any:
        """Return x · w with quantised weights, whose codes are stored as [out, in]."""
        weight = self._linear_weight(op, w, w, is_turned=is_turned)
        kept = self._dequantized(op, w.name, weight if is_turned else weight.transpose())
        return op.MatMul(x, op.Transpose(kept, perm=[1, 0]))

    def looked_up(self, op: Any, w: Any, ids: Any) -> Any:
        """Match the table of an embedding, [vocab, hidden]."""
        return op.Gather(op.weight(w), ids, axis=0)

    def rewrite_looked_up(self, op: Rewriter, w: Any, ids: Any) -> Any:
        """Look up codes and scales, and multiply them; decline unless the option `embedding` is set."""
        if w.dtype not in MODEL_FLOATS or len(w.shape) != 2:
            raise Decline(f"{w.name} is not a floating matrix")
        if not self.embedding and self.method != "stored":
            raise Decline(f"{w.name} is an embedding; int8{{embedding=true}} includes it")
        codes, scales = self._stored(op, w.name, op.weight(w), is_table=True)
        rows, factor = op.Gather(codes, ids, axis=0), op.Gather(scales, ids, axis=0)
        return op.Mul(op.Cast(rows, to=w.dtype.value), op.Unsqueeze(factor, [-1]))

    def _linear_weight(self, op: Any, w: Any, operand: onnx_ir.Value, *, is_turned: bool) -> Expression:
        """Return the weight if all users of `operand` are linears that this pass includes; decline otherwise."""
        if w.dtype not in MODEL_FLOATS or len(w.shape) != 2:
            raise Decline(f"{w.name} is not a floating matrix")
        if operand.is_graph_output():
            raise Decline(f"{w.name} is a graph output")
        users = [use.node for use in operand.uses()]
        if not users or not all(_reads_columns(node, operand, is_turned) for node in users):
            raise Decline(f"{w.name} is used by other operators than linears")
        if not self.head and self.method != "stored" and any(is_head(node) for node in users):
            raise Decline(f"{w.name} is the head; int8{{head=true}} includes it")
        weight: Expression = op.weight(w)
        return weight

    def _dequantized(self, op: Rewriter, name: str | None, weight: Expression) -> Any:
        """Return the DequantizeLinear of a weight's codes [out, in], with one scale per row.

        There is no zero point, since the codes are symmetric.
        """
        if op.opset < OPSET_OF_SCALES_PER_CHANNEL:
            needed = OPSET_OF_SCALES_PER_CHANNEL
            raise Decline(f"one scale per channel needs opset {needed}, this model has {op.opset}; run legalize first")
        return op.DequantizeLinear(*self._stored(op, name, weight), axis=0)

    def _stored(
        self, op: Rewriter, name: str | None, weight: Expression, *, is_table: bool = False
    ) -> list[onnx_ir.Value]:
        """Return the codes and scales of a weight's rows, which all that read the same bytes of a file share."""
        parts = zip(("codes", "scales"), self._codes(weight, is_table=is_table), strict=True)
        content = content_of(weight)
        return [op.shared((kind, content), partial(op.initializer, f"{name}.{kind}", part)) for kind, part in parts]

    def _codes(self, weight: Expression, *, is_table: bool) -> tuple[Expression, Expression]:
        own = own_codes(weight, 0)
        if not self.from_:
            if own is None and self.method == "stored":
                raise Decline("the weight was not quantised before it was exported, or not by output channels")
            return own or weight.quantize(0)
        calibration = Calibration.of(self.from_)
        if (is_table or own is not None) and not holds_codes(weight, calibration):
            return own or weight.quantize(0)
        return stored_codes(weight, 0, calibration, self.name)


def _reads_columns(node: onnx_ir.Node, operand: onnx_ir.Value, is_turned: bool) -> bool:
    """Return True for a linear whose output channels are the columns of `operand`, or its rows if `is_turned`."""
    turned = node.op_type == "Gemm" and "transB" in node.attributes and bool(node.attributes["transB"].as_int())
    return node.op_type in _LINEARS and node.inputs[1] is operand and turned == is_turned


def _is_half(dtype: onnx_ir.DataType | None) -> bool:
    return dtype in {onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16}
