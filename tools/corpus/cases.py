"""Collect the models of the corpus, each with inputs that it accepts.

They are ONNX's own backend models, which the onnx package builds when it is asked to, and the files of packages that
`wheels` names. A case has no expected outputs: what counts is what the unchanged model computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import importlib
import io
import random
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

#: Operators whose numbers differ from run to run; their outputs are compared by dtype and shape only.
_RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
#: The end of the name of a model that holds the body of an operator instead of the operator.
_EXPANDED = re.compile(r"_expanded(_ver\d+)?$")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with inputs.

    Attributes:
        name: The name of the case.
        model: The model; nobody changes it.
        feeds: The inputs by name: arrays, lists of arrays for sequences, and None for an absent optional.
        variants: The variants to write it in, for a large model; all of them if empty.
    """

    name: str
    model: onnx.ModelProto
    feeds: Mapping[str, Any]
    variants: tuple[str, ...] = ()

    @property
    def is_random(self) -> bool:
        """Return whether the model computes other numbers in every run."""
        nodes = list(self.model.graph.node)
        dropouts = any(node.op_type == "Dropout" and len(node.input) > 2 and node.input[2] for node in nodes)
        return dropouts or any(node.op_type in _RANDOM for node in nodes)


def backend_cases(modules: Sequence[str] = ()) -> list[Case]:
    """Return the models of ONNX's backend tests, in the order of their names.

    Args:
        modules: The modules of `onnx.backend.test.case.node` to collect, such as "gather"; all of them if empty, and
            then the models of several nodes too. Collecting all takes some seconds.
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from onnx.backend.test.case import node

        if modules:
            for module in modules:
                importlib.import_module(f"onnx.backend.test.case.node.{module}")
            # There is no public function that builds the models of one operator without building all others.
            kinds = {name: proto.op_type.lower() for name, proto in node._existing_names.items()}
            found = [item for item in node._NodeTestCases if kinds[_EXPANDED.sub("", item.name)] in modules]
        else:
            from onnx.backend.test.case import model

            found = [*node.collect_testcases(None), *model.collect_testcases()]
    cases = [_case(item) for item in found if item.model is not None and item.data_sets]
    return sorted({case.name: case for case in cases}.values(), key=lambda case: case.name)


def _case(item: Any) -> Case:
    inputs = item.data_sets[0][0]
    names = [value.name for value in item.model.graph.input]
    feeds = {name: _plain(value) for name, value in zip(names, inputs, strict=False)}
    return Case(item.name, item.model, feeds)


def _plain(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if value is None else np.asarray(value)


def chosen(cases: Sequence[Case], only: Sequence[str], part: str, seed: int = 17) -> list[Case]:
    """Return the cases whose names match one of the patterns, or of these the part "N/M" of a shuffled list."""
    found = [case for case in cases if not only or any(fnmatch.fnmatch(case.name, pattern) for pattern in only)]
    if not part:
        return found
    number, _, parts = part.partition("/")
    shuffled = random.Random(seed).sample(found, len(found))
    return sorted(shuffled[int(number) - 1 :: int(parts)], key=lambda case: case.name)
