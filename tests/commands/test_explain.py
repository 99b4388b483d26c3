"""`passopt explain`: every pass and pipeline, in both forms, true to its class."""

from __future__ import annotations

import dataclasses
import json

import pytest

from passopt.api.explain import parse_doc
from passopt.cli import main
from passopt.passes.framework.catalog import catalog, pass_class
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.patterns.rules import rules_of
from passopt.passes.pipeline.named import PIPELINES
from passopt.passes.pipeline.text import resolve


def explained(capsys, name):
    assert main(["explain", name]) == 0
    text = capsys.readouterr().out
    assert main(["explain", name, "--json"]) == 0
    return text, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", sorted(catalog()))
def test_every_pass_is_explained_as_it_is(capsys, name):
    text, body = explained(capsys, name)
    item, cls = resolve(name).passes[0], pass_class(name)
    assert body["name"] == name
    assert body["accuracy"] == str(item.accuracy)
    assert body["summary"]
    assert body["before"]
    assert body["after"]
    assert [option["name"] for option in body["options"]] == [
        field.name.rstrip("_") for field in dataclasses.fields(cls)
    ]
    assert body["after_passes"] == list(cls.after)
    rules = rules_of(item) if isinstance(item, RewritePass) else ()
    assert [rule["name"] for rule in body["rules"]] == [rule.name for rule in rules]
    for rule, traced in zip(body["rules"], rules):
        assert len(rule["roots"]) == len(traced.pattern.roots)
    for word in (name, "BEFORE", "AFTER", *(option["name"] for option in body["options"])):
        assert word in text
    assert max(map(len, text.splitlines())) < 200


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_every_pipeline_shows_its_steps_with_their_options(capsys, name):
    text, body = explained(capsys, name)
    assert body["expanded"] == resolve(name).expanded
    assert ",".join(step["step"] for step in body["steps"]) == body["expanded"]
    assert body["expectations"] == list(PIPELINES[name].expectations)
    assert all(step["summary"] in text for step in body["steps"])


def test_the_diagram_of_before_is_traced_and_that_of_after_is_the_docstring(capsys):
    text, body = explained(capsys, "fuse-rms-norm")
    assert "├─ power: Pow" in text
    assert "    y ← RMSNormalization(epsilon=eps)\n    ├─ x\n    └─ w\n" in text
    assert any("not the last one" in guard["reason"] for guard in body["declines"])
    assert body["makes"] == ["RMSNormalization"]


def test_options_given_are_those_of_the_pipeline(capsys):
    _, body = explained(capsys, "tp{degree=3}")
    assert "shard{degree=3,pad=false}" in body["expanded"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fold-constant", "unknown pass 'fold-constant'; did you mean 'fold-constants'"),
        ("int9", "did you mean 'int8'"),
        ("cse,dead-code", "is several passes; name one"),
        ("dead-code{limit=3}", "dead-code: unknown option 'limit'"),
    ],
)
def test_what_cannot_be_explained_says_why(capsys, name, message):
    assert main(["explain", name]) == 2
    assert message in capsys.readouterr().err


def test_a_docstring_is_taken_apart():
    doc = parse_doc(
        "Why it\nis.\n\nBefore: ``a``\n        or ``b``\nAfter:  ``c``;\n        or ``d``\nA note.\nMore of it."
    )
    assert (doc.why, doc.before, doc.after) == ("Why it is.", "``a`` or ``b``", "``c``; or ``d``")
    assert doc.notes == "A note.\nMore of it."
    bare = parse_doc("Why.")
    assert (bare.why, bare.before, bare.after, bare.notes) == ("Why.", "", "", "")


def test_guards_of_the_other_rooms_of_a_pass_are_listed(capsys):
    assert main(["explain", "fuse-attention", "--json"]) == 0
    declines = json.loads(capsys.readouterr().out)["declines"]
    files = {guard["file"] for guard in declines}
    assert {"fuse_attention.py", "attention_parts.py", "attention_masks.py"} <= files
    assert "the fused operator needs opset 23, this model has …; run legalize first" in {
        guard["reason"] for guard in declines
    }
    assert not files & {"base.py", "rewrite_pass.py", "rules.py"}
    assert any("does not have four axes" in guard["reason"] for guard in declines)


def test_guards_of_another_pass_are_not(capsys):
    """dematerialize-alibi-row shares two functions with dematerialize-alibi."""
    assert main(["explain", "dematerialize-alibi-row", "--json"]) == 0
    declines = json.loads(capsys.readouterr().out)["declines"]
    assert {guard["file"] for guard in declines} == {"dematerialize_alibi_row.py"}
