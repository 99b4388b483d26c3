"""Pipeline text: what it resolves to, and the error for everything that is wrong in it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, Optional

import pytest

from passopt.ir.errors import UsageError
from passopt.passes.cleanup.dead_code import RemoveDeadCode
from passopt.passes.framework import base
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassResult
from passopt.passes.lm_head.fold_norm_head import FoldNormHead
from passopt.passes.lm_head.inject_norm_head_bias import InjectNormHeadBias
from passopt.passes.pipeline.named import PIPELINES
from passopt.passes.pipeline.text import Step, describe, parse_steps, resolve
from passopt.passes.precision.quantize_activations import QuantizeActivations
from passopt.passes.precision.quantize_weights import QuantizeWeights
from passopt.passes.sharding.shard import Shard


@pytest.fixture
def registered():
    """A pass with options of every kind, registered for one test."""

    @dataclasses.dataclass(frozen=True)
    class AllOptions(Pass):
        """Options of every kind."""

        name = "test-all-options"
        after: ClassVar[tuple[str, ...]] = ("fold-norm-head",)

        needed: int
        ratio: float = 0.5
        mode: Literal["fast", "slow"] = "fast"
        text: str = ""
        maybe: int | None = None
        old: Optional[int] = 3  # noqa: UP045
        flag: bool = False
        several: tuple[int, ...] = ()
        from_: str = ""

        def run(self, model):
            return PassResult()

    yield AllOptions
    del base.REGISTERED["test-all-options"]


def test_steps_and_options():
    assert parse_steps(" a , b{x=1, y-z = two},c{}") == (
        Step("a"),
        Step("b", (("x", "1"), ("y_z", "two"))),
        Step("c"),
    )


def test_named_pipelines_expand_with_their_options():
    resolved = resolve("tp{degree=4},int8{head=true}")
    assert resolved.passes == (
        FoldNormHead(),
        InjectNormHeadBias(),
        Shard(degree=4, pad=False),
        RemoveDeadCode(),
        FoldNormHead(),
        QuantizeWeights(embedding=False, head=True),
        QuantizeActivations(activations="none"),
        RemoveDeadCode(),
    )
    assert resolved.text == "tp{degree=4},int8{head=true}"


@pytest.mark.parametrize("text", ["tp", "int8", "int8,tp{degree=3,pad=true}", "fold-constants{limit=7},dead-code"])
def test_the_resolved_text_resolves_to_the_same(text):
    resolved = resolve(text)
    assert resolve(resolved.expanded).passes == resolved.passes


def test_every_named_pipeline_resolves():
    for name in PIPELINES:
        assert resolve(name).passes


def test_options_are_parsed_by_type(registered):
    text = "test-all-options{needed=3,ratio=1e-3,mode=slow,text=a b,maybe=4,old=none,flag=true}"
    (item,) = resolve(text).passes
    assert item == registered(3, 1e-3, "slow", "a b", 4, None, True)
    (item,) = resolve("test-all-options{needed=3,from=some/folder.d}").passes
    assert item == registered(3, from_="some/folder.d")
    assert describe(item).endswith("from=some/folder.d}")
    assert describe(registered(3)).startswith("test-all-options{needed=3,ratio=0.5,mode=fast,text=,maybe=none,old=3,")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the pipeline is empty"),
        ("  ", "the pipeline is empty"),
        ("tp,,int8", "not 'a,b{key=value}' at position 3:\n  tp,,int8\n     ^"),
        ("tp{degree=2", "at position 0"),
        ("tp}", "at position 0"),
        ("tp int8", "at position 0"),
        ("shard{degree}", "shard: option 'degree' has no value; write degree=…"),
        ("shrad", "unknown pass 'shrad'; did you mean 'shard'"),
        ("int9", "unknown pass 'int9'; did you mean 'int8'"),
        ("qqqqqq", "unknown pass 'qqqqqq'; passopt list shows all"),
        ("shard{degre=2}", "shard: unknown option 'degre'; did you mean 'degree'"),
        ("tp{degre=2}", "tp: unknown option 'degre'; did you mean 'degree'"),
        ("dead-code{x=1}", "dead-code: unknown option 'x'; there are: none"),
        ("shard{degree=two}", "shard: option degree=two is not an integer"),
        ("tp{degree=2.5}", "shard: option degree=2.5 is not an integer"),
        ("shard{pad=yes}", "shard: option pad=yes is not true or false"),
        ("shard{pad=True}", "shard: option pad=True is not true or false"),
    ],
)
def test_bad_text_is_refused(text, message):
    with pytest.raises(UsageError) as error:
        resolve(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "test-all-options: needs a value for needed: test-all-options{needed=…}"),
        ("needed=1,ratio=x", "option ratio=x is not a number"),
        ("needed=1,mode=medium", "option mode=medium is not one of fast, slow"),
        ("needed=1,maybe=x", "option maybe=x is not an integer"),
        ("needed=1,several=1", "option several has type tuple[int, ...], which pipeline text cannot give"),
    ],
)
def test_options_of_the_wrong_type_are_refused(registered, options, message):
    with pytest.raises(UsageError) as error:
        resolve(f"test-all-options{{{options}}}")
    assert message in str(error.value)


def test_order_is_validated_and_never_changed(registered):
    with pytest.raises(UsageError) as error:
        resolve("shard,dead-code,fold-norm-head")
    assert str(error.value) == (
        "shard stands before fold-norm-head, but must come after it; "
        "the order given was: shard,dead-code,fold-norm-head"
    )
    names = [item.name for item in resolve("dead-code,fold-norm-head,shard").passes]
    assert names == ["dead-code", "fold-norm-head", "shard"]
    assert resolve("shard").passes == (Shard(),)
    assert len(resolve("fold-norm-head,shard,fold-norm-head").passes) == 3


def test_a_pass_that_is_no_dataclass_says_what_to_do():
    class Plain(Pass):
        name = "test-plain"

        def run(self, model):
            return PassResult()

    try:
        with pytest.raises(UsageError, match="Plain is not a dataclass; decorate it with @dataclass"):
            resolve("test-plain")
        assert describe(Plain()) == "test-plain"
    finally:
        del base.REGISTERED["test-plain"]
