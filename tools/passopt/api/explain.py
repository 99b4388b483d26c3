"""Explain a pass or a pipeline: its purpose, options, patterns as diagrams, and guards (`passopt.explain`)."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from passopt.ir.errors import UsageError
from passopt.passes.explain.diagrams import Diagram, code_trees, diagram, draw
from passopt.passes.framework.base import Pass
from passopt.passes.framework.catalog import catalog, unknown_pass
from passopt.passes.framework.source_entries import Entry
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.patterns.rules import FUSED_OPSET, rules_of
from passopt.passes.pipeline.named import PIPELINES, Pipeline
from passopt.passes.pipeline.text import Step, describe, expand, instantiate, parse_steps, resolve
from passopt.reporting.result import Result

_WIDTH = 100
_SECTION = re.compile(r"^(Before|After):\s*", re.MULTILINE)
_CODE = re.compile(r"``(.+?)``", re.DOTALL)


#: The modules that every pass builds on. They are not searched for guards: the guard of `op.require_opset`, for
#: example, is listed at the line of the pass that calls it.
_FRAMEWORK = ("passopt.passes.framework.", "passopt.passes.patterns.")


@dataclasses.dataclass(frozen=True)
class Doc:
    """The parts of a pass's docstring: the sentence of why, Before, After, and the notes below."""

    why: str
    before: str
    after: str
    notes: str


@dataclasses.dataclass(frozen=True)
class DrawnRule:
    """A rule of a pass: its name, its source line, its docstring, and its pattern as a diagram."""

    name: str
    source: str
    doc: str
    diagram: Diagram


@dataclasses.dataclass(frozen=True)
class Guard:
    """A place where the pass may decline or fail, with the reason as written there; `…` stands for a run-time value."""

    file: str
    line: int
    reason: str


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation(Result):
    """The explanation of a pass or a pipeline.

    Attributes:
        name: The name of the pass or pipeline.
        text: The explanation as text.
        facts: The explanation as an object for JSON.
    """

    name: str
    text: str
    facts: dict[str, Any]

    def to_text(self) -> str:
        return self.text

    def to_json(self) -> dict[str, Any]:
        return self.facts


def explain(name: str) -> Explanation:
    """Explain a pass or a named pipeline: its purpose, options, what it looks for and makes, and where it declines.

    Args:
        name: A name that `passopt list` shows, with options if they matter, such as `"tp{degree=4}"`.

    Returns:
        The explanation.

    Raises:
        UsageError: There is no such pass or pipeline, an option is wrong, `name` names several passes, or the plug-in
            cannot be used.
        PassError: A rule of the pass can never work.
    """
    steps = parse_steps(name)
    if len(steps) != 1:
        raise UsageError(f"explain: {name!r} is several passes; name one, or a pipeline of passopt list")
    (step,) = steps
    if step.name in PIPELINES:
        body = _pipeline_json(step, PIPELINES[step.name])
        return Explanation(step.name, _pipeline_text(body), body)
    entry = catalog().get(step.name)
    if entry is None:
        raise unknown_pass(step.name, PIPELINES)
    item = instantiate(step)
    doc, rules, guards = parse_doc(inspect.getdoc(type(item)) or ""), _rules(item), _guards(entry)
    text = "\n".join(_pass_text(entry, item, doc, rules, guards))
    return Explanation(step.name, text, _pass_json(entry, item, doc, rules, guards))


def parse_doc(text: str) -> Doc:
    """Split a pass's docstring into the sentence of why, Before, After, and notes.

    Notes are what follows After on lines that are not indented.

    Args:
        text: The docstring, without its common indentation.

    Returns:
        The parts; "" for those that are missing.
    """
    pieces = _SECTION.split(text)
    sections = dict(zip(pieces[1::2], pieces[2::2]))
    after, notes = _split_notes(sections.get("After", ""))
    return Doc(_one_line(pieces[0]), _one_line(sections.get("Before", "")), _one_line(after), notes)


def _split_notes(text: str) -> tuple[str, str]:
    lines = text.rstrip().splitlines()
    end = next((index for index, line in enumerate(lines) if index and line and not line[0].isspace()), len(lines))
    return "\n".join(lines[:end]), "\n".join(lines[end:])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _rules(item: Pass) -> list[DrawnRule]:
    if not isinstance(item, RewritePass):
        return []
    return [
        DrawnRule(rule.name, _near(rule.source), _one_line(method.__doc__ or ""), diagram(rule.pattern))
        for rule, (method, _) in zip(rules_of(item), item.rules(), strict=True)
    ]


def _near(source: str) -> str:
    """Return `file:line` with the path relative to the current folder, if the file lies below that."""
    with contextlib.suppress(ValueError):
        return str(Path(source).relative_to(Path.cwd()))
    return source


def _guards(entry: Entry) -> list[Guard]:
    """Return every `raise Decline(…)` and `raise PassError(…)` of the pass's file and of the files it is split into."""
    own = Path(entry.origin.rpartition(":")[0])
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in (own, *_parts(own, entry.module))}
    return [Guard(file.name, line, reason) for file, tree in trees.items() for line, reason in _said(tree)]


def _parts(file: Path, module: str) -> list[Path]:
    """Return the files that belong to a pass besides its own: those in its folder that it imports, directly or not.

    Files of the framework and of other passes are left out.
    """
    package, known, found = module.rpartition(".")[0], {item.module for item in catalog().values()}, [file]
    for importer in found:
        for node in ast.walk(ast.parse(importer.read_text(encoding="utf-8"))):
            name = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            part = importer.parent / f"{name.rpartition('.')[2]}.py"
            if (
                name.startswith(f"{package}.")
                and name not in known
                and not name.startswith(_FRAMEWORK)
                and part.is_file()
                and part not in found
            ):
                found.append(part)
    return found[1:]


def _said(tree: ast.Module) -> list[tuple[int, str]]:
    """Return the line and the reason of every refusal.

    A refusal is raised here, or by `op.require_opset`, which raises on behalf of its caller.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(call := node.exc, ast.Call):
            if ast.unparse(call.func) in {"Decline", "PassError"} and call.args:
                found.append((node.lineno, _reason(call)))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "op.require_opset":
            opset = ast.unparse(node.args[0]) if node.args else FUSED_OPSET
            reason = f"the fused operator needs opset {opset}, this model has …; run legalize first"
            found.append((node.lineno, reason))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "op.number":
            found.append((node.lineno, "… is …, not one number"))
    first: dict[str, int] = {}
    for line, reason in sorted(found):
        first.setdefault(reason, line)  # one that many lines may give is said once
    return [(line, reason) for reason, line in first.items()]


def _reason(call: ast.Call) -> str:
    words = call.args[0]
    if isinstance(words, ast.Constant):
        return str(words.value)
    if isinstance(words, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in words.values)
    return "…"


def _pass_text(
    entry: Entry, item: Pass, doc: Doc, rules: Sequence[DrawnRule], guards: Sequence[Guard]
) -> Iterator[str]:
    yield f"{entry.name}  ({item.accuracy})  {_near(entry.origin)}"
    yield from _wrapped(doc.why)
    yield ""
    yield from _facts(entry, item)
    yield ""
    yield "BEFORE"
    if doc.before:
        yield from _wrapped(doc.before)
    for index, rule in enumerate(rules):
        count = f"rule {index + 1} of {len(rules)}, " if len(rules) > 1 else ""
        yield f"\n  {count}{rule.name} ({rule.source})" + (f": {rule.doc}" if rule.doc else "")
        yield from (f"    {line}".rstrip() for line in rule.diagram.lines())
    if not rules:
        yield from _code_diagrams(doc.before)
    yield "\nAFTER"
    yield from _wrapped(doc.after or "the docstring does not say")
    yield from _code_diagrams(doc.after)
    if doc.notes:
        yield "\nNOTES"
        yield from _wrapped(doc.notes)
    if guards:
        yield "\nSAYS NO WHERE"
        width = max(len(f"{guard.file}:{guard.line}") for guard in guards)
        for guard in guards:
            yield f"  {f'{guard.file}:{guard.line}':{width}}  {guard.reason}"


def _facts(entry: Entry, item: Pass) -> Iterator[str]:
    if not entry.options:
        yield "  options  none"
    for index, (name, kind, default) in enumerate(entry.options):
        shown = f"{name}: {kind}" + (f" = {default}" if default else "  (must be given)")
        yield f"  {'options' if not index else '':7}  {shown}"
    if item.after:
        yield f"  after    {', '.join(item.after)}, where they are in the pipeline"
    if makes := getattr(item, "makes", ()):
        yield f"  makes    {', '.join(makes)}"
    users = [name for name, pipeline in PIPELINES.items() if entry.name in {_name(step) for step in pipeline.steps}]
    if users:
        yield f"  in       {', '.join(users)}"


def _name(step: str) -> str:
    return parse_steps(step)[0].name


def _wrapped(text: str) -> list[str]:
    return [f"  {line}" for line in textwrap.wrap(_one_line(text).replace("``", ""), _WIDTH)]


def _code_diagrams(text: str) -> Iterator[str]:
    for code in _CODE.findall(text):
        trees = code_trees(_one_line(code)) or []
        if any(tree.children for tree in trees):
            yield ""
            for tree in trees:
                yield from ("    " + line for line in draw(tree))


def _pass_json(
    entry: Entry, item: Pass, doc: Doc, rules: Sequence[DrawnRule], guards: Sequence[Guard]
) -> dict[str, Any]:
    return {
        "name": entry.name,
        "summary": doc.why,
        "accuracy": str(item.accuracy),
        "source": entry.origin,
        "options": [{"name": name, "type": kind, "default": default} for name, kind, default in entry.options],
        "after_passes": list(item.after),
        "makes": list(getattr(item, "makes", ())),
        "before": doc.before,
        "after": doc.after,
        "notes": _one_line(doc.notes),
        "rules": [
            {"name": rule.name, "source": rule.source, "doc": rule.doc, **rule.diagram.to_json()} for rule in rules
        ],
        "declines": [dataclasses.asdict(guard) for guard in guards],
    }


def _pipeline_json(step: Step, pipeline: Pipeline) -> dict[str, Any]:
    entries = catalog()
    steps = []
    for inner in expand(step, pipeline):
        entry = entries[inner.name]
        steps.append({"step": describe(instantiate(inner)), "summary": entry.summary, "source": _near(entry.origin)})
    return {
        "name": step.name,
        "summary": pipeline.summary,
        "options": dict(pipeline.options),
        "steps": steps,
        "expectations": list(pipeline.expectations),
        "expected_with": [
            {"option": option, "value": value, "expectation": wanted}
            for option, value, wanted in pipeline.expected_with
        ],
        "expanded": resolve(str(step)).expanded,
    }


def _pipeline_text(body: dict[str, Any]) -> str:
    options = ",".join(f"{key}={value}" for key, value in body["options"].items())
    lines = [f"{body['name']}{f'{{{options}}}' if options else ''}  a pipeline", *_wrapped(body["summary"]), ""]
    for index, step in enumerate(body["steps"]):
        lines += [f"  {index + 1:2}  {step['step']}", f"      {step['summary']}"]
    if body["expectations"]:
        lines += ["", f"  expects  {', '.join(body['expectations'])}"]
    for item in body["expected_with"]:
        lines.append(f"           with {item['option']}={item['value']}: {item['expectation']}")
    return "\n".join([*lines, "", f"  is --passes '{body['expanded']}'"])
