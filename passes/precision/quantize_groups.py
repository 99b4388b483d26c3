"""Define the pass `quantize-groups`, which stores weights as codes of 4 bits with a scale per group of inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import onnx_ir

from passopt.ir.calibration.calibration import Calibration
from passopt.ir.dtypes import OPSET_OF_GROUPS
from passopt.ir.errors import CalibrationError, PassError, UsageError
from passopt.ir.weights.dequantized import own_groups
from passopt.ir.weights.expressions import DataType, Expression
from passopt.ir.weights.groups import quantize_groups
from passopt.passes.framework.accuracy import QualityBar, lossy
from passopt.passes.framework.base import Decline, Pass
from passopt.passes.framework.records import PassResult
from passopt.passes.patterns.rules import Rewriter
from passopt.passes.precision.group_fit import GROUPS, check_groups
from passopt.passes.precision.inline_weights import content_of
from passopt.passes.precision.quantize_weights import QuantizeWeights
from passopt.passes.precision.stored_codes import stored_groups


@dataclasses.dataclass(frozen=True)
class QuantizeGroups(QuantizeWeights):
    """Store linear weights as codes of 4 bits with a scale per group of inputs: about an eighth of fp32.

    Before: ``y = MatMul(x, Transpose(w))``, w [out, in]
    After:  ``y = MatMul(x, Transpose(DequantizeLinear<axis=1, block_size=64>(w.codes, w.scales)))``
    Codes are int4 within ±7 times absmax/7 of their group; with `symmetric=false` they are uint4 from the least to the
    largest number of the group, with a zero point each. It takes opset 21. Groups must fill the inputs of a weight, and
    with tensor parallelism those of each rank, which is checked before any pass runs. Embedding and head stay as they
    are; `head=true` includes the head.
    With `from`, codes and scales are those that `passopt calibrate --bits 4 --group N` wrote to this folder. A weight
    that was quantised elsewhere in such groups keeps its own codes, from −8 on; `method=stored` quantises only these.
    """

    name = "quantize-groups"
    #: A code is off by at most 1/14 of its group's largest weight, and by 1/28 in the mean; a product with normally
    #: distributed weights is off by about 12 %.
    #: A trained model of 135M parameters, which suffers more than large ones, in groups of 64: KL 0.46 to 0.53, 1.6 to
    #: 2.2 at 99 %, top-1 0.64 when rounded to the nearest; by GPTQ 0.18 to 0.21, 1.0 to 1.4, 0.77. The
    #: bar is twice the former, for groups of 128; what loses more is no rounding any more.
    accuracy = lossy(0.3, bar=QualityBar(kl=1.0, kl99=4.5, top1=0.5))

    embedding: ClassVar[bool] = False  # type: ignore[misc]  # a table of 4 bits would be dequantised whole each step
    head: bool = False
    method: Literal["auto", "rtn", "gptq", "stored"] = "auto"
    from_: str = ""
    group: int = 64
    symmetric: bool = True

    def foresee(self, model: onnx_ir.Model, pipeline: Sequence[Pass]) -> None:
        """Raise UsageError if groups do not fill the inputs of a weight, or of its part on each rank."""
        self._check_group()
        if self.method == "stored":  # Its weights have such groups, or stay as they are.
            return
        degrees = [getattr(item, "degree", 1) for item in pipeline if item.name == "shard"]
        padded = any(getattr(item, "pad", False) for item in pipeline if item.name == "shard")
        check_groups(model, self.name, self.group, degrees[0] if degrees and not padded else 1, head=self.head)

    def run(self, model: onnx_ir.Model) -> PassResult:
        """Quantise weights in place; raise PassError if the opset or the lengths of the weights do not allow it."""
        self._check_group()
        opset = model.graph.opset_imports.get("", 0)
        if opset < OPSET_OF_GROUPS:
            raise PassError(
                f"{self.name}: DequantizeLinear takes codes of 4 bits and scales of groups from opset "
                f"{OPSET_OF_GROUPS} on, this model has {opset}. Run legalize{{opset={OPSET_OF_GROUPS}}} first."
            )
        return super().run(model)

    def _check_group(self) -> None:
        if self.group not in GROUPS:
            raise UsageError(f"{self.name}: group={self.group}, expected {', '.join(map(str, GROUPS))}")
        if self.from_ and not self.symmetric:
            raise UsageError(f"{self.name}: the codes of {self.from_} are symmetric; leave symmetric=false out")

    def _check_method(self) -> None:
        if not self.from_ and self.method == "gptq":
            raise CalibrationError(
                f"{self.name}: method=gptq needs codes that were calibrated. Make them: passopt calibrate MODEL --data "
                f"FILE --bits 4 --group {self.group} -o CALIB; then quantise with int4{{group={self.group},from=CALIB}}"
            )
        if not self.from_:
            return
        known = [item for entry in Calibration.of(self.from_).weights.values() for item in entry.codes]
        made = {item.method for item in known if (item.bits, item.group) == (4, self.group)}
        if known and not made:
            kinds = ", ".join(sorted({f"{item.bits} bits, group {item.group or 'none'}" for item in known}))
            raise CalibrationError(
                f"{self.name}: {self.from_} holds codes of {kinds}, expected 4 bits in groups of {self.group}. "
                f"Calibrate for these: passopt calibrate MODEL --bits 4 --group {self.group} …"
            )
        if self.method != "auto" and made and self.method not in made:
            raise CalibrationError(
                f"{self.name}: the codes of {self.from_} are of the method {', '.join(sorted(made))}, not of "
                f"{self.method}"
            )

    def rewrite_looked_up(self, op: Rewriter, w: Any, ids: Any) -> Any:
        """Decline: no operator looks up rows of codes of 4 bits."""
        raise Decline(f"{w.name} is an embedding, which stays as it is")

    def _dequantized(self, op: Rewriter, name: str | None, weight: Expression) -> Any:
        """Return the DequantizeLinear of a weight's codes [out, in], with a scale per group of each row."""
        if self.method == "stored" and own_groups(weight, self.group) is None:
            raise Decline(f"the weight was not quantised in groups of {self.group} before it was exported")
        if weight.shape[1] % self.group:
            raise PassError(f"{self.name}: groups of {self.group} do not fill the {weight.shape[1]} inputs of {name}")
        return op.DequantizeLinear(*self._stored(op, name, weight), axis=1, block_size=self.group)

    def _stored(
        self, op: Rewriter, name: str | None, weight: Expression, *, is_table: bool = False
    ) -> list[onnx_ir.Value]:
        """Return codes, scales and zero points of a weight, which all that read the same bytes of a file share."""
        parts = zip(("codes", "scales", "zeros"), self._parts(weight), strict=False)
        content = content_of(weight)
        return [op.shared((kind, content), partial(op.initializer, f"{name}.{kind}", part)) for kind, part in parts]

    def _parts(self, weight: Expression) -> tuple[Expression, ...]:
        if self.from_:
            codes, scales = stored_groups(weight, self.group, Calibration.of(self.from_), self.name)
            return codes.cast(DataType.INT4), scales
        own = own_groups(weight, self.group) if self.symmetric else None
        if own is not None:
            return own[0].cast(DataType.INT4), own[1]
        codes, scales, *zeros = quantize_groups(weight, self.group, symmetric=self.symmetric)
        kind = DataType.INT4 if self.symmetric else DataType.UINT4
        return (codes.cast(kind), scales, *(part.cast(kind) for part in zeros))
