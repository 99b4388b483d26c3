"""Write the generated part of the reference: what there is to say of every pass, pipeline and command.

    python tools/docs/reference.py [DIR]      (default: docs/reference/generated)

As a Sphinx extension (`extensions = ["reference"]`, with tools/docs on sys.path) it writes them before a build, and
makes docstrings, whose bars and backslashes mean themselves, safe for reStructuredText. The pages are included by those
beside the folder, which git ignores; nothing in them is written by hand, and they are no pages by themselves.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import passopt
from passopt.cli.main import COMMANDS, parser
from passopt.passes.explain.diagrams import diagram
from passopt.passes.framework.catalog import catalog, pass_class
from passopt.passes.framework.source_entries import Entry
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.patterns.rules import rules_of

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "reference" / "generated"
#: Each room of passes with its heading, in the order of the page.
ROOMS: Mapping[str, str] = {
    "fusion": "Fusion: many operators become one",
    "attention": "Attention: other spellings of attention and its weights",
    "lm_head": "Head: what happens before the logits",
    "cleanup": "Clean-up: the same computation, written once and plainly",
    "opset": "Opset: another version of the operators",
    "precision": "Precision: fewer bits",
    "sharding": "Sharding: one graph for every rank",
    "decomposition": "Decomposition: one operator becomes many",
}
#: Passes with a picture in docs/pictures.
PICTURES: Mapping[str, str] = {
    "fuse-rms-norm": "fuse-rms-norm.svg",
    "fuse-rotary": "fuse-rotary.svg",
    "fuse-attention": "fuse-attention.svg",
    "dematerialize-alibi": "alibi.svg",
    "shard": "sharding.svg",
}
#: Diagrams longer than this are folded away.
_LONG = 40
_WIDTH = 100


def pages() -> dict[str, str]:
    """Return the text of every generated page by its file name."""
    return {"passes.inc": passes_page(), "pipelines.inc": pipelines_page(), "cli.inc": cli_page()}


def write(folder: Path = FOLDER) -> list[Path]:
    """Write the pages; those that did not change keep their time, so that Sphinx does not read them again.

    Args:
        folder: Where they go; it is made if need be.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, text in pages().items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
        files.append(path)
    return files


def passes_page() -> str:
    """Return a table of all built-in passes, and a section for each of them, by room."""
    entries = {name: entry for name, entry in catalog().items() if entry.module.startswith("passopt.passes.")}
    rooms: dict[str, list[Entry]] = {room: [] for room in ROOMS}
    for entry in entries.values():
        rooms.setdefault(entry.module.split(".")[2], []).append(entry)
    lines = ["| pass | what it is for |", "| --- | --- |"]
    for found in rooms.values():
        lines += [f"| [`{entry.name}`](#{entry.name}) | {_cell(entry.summary)} |" for entry in found]
    for room, found in rooms.items():
        if found:
            lines += ["", f"## {ROOMS.get(room, room)}"]
        for entry in found:
            lines += ["", *_pass_section(entry)]
    return "\n".join(lines) + "\n"


def _pass_section(entry: Entry) -> Iterator[str]:
    facts = passopt.explain(entry.name).to_json()
    yield f"### {entry.name}"
    yield ""
    yield _markdown(facts["summary"])
    yield ""
    yield "| | |"
    yield "| --- | --- |"
    yield f"| Options | {_options(facts['options'])} |"
    yield f"| Accuracy | {facts['accuracy']} |"
    if facts["makes"]:
        yield f"| Makes | {_codes(facts['makes'])} |"
    if facts["after_passes"]:
        links = ", ".join(f"[`{name}`](#{name})" for name in facts["after_passes"])
        yield f"| Runs after | {links}, where they are in the pipeline |"
    users = [name for name, item in passopt.list_passes().pipelines.items() if _uses(item.steps, entry.name)]
    if users:
        yield f"| Part of | {', '.join(f'[`{name}`](pipelines.md#{name})' for name in users)} |"
    yield f"| Source | `{_source(entry)}` |"
    yield ""
    yield f"**Before:** {_markdown(facts['before'])}"
    yield ""
    yield f"**After:** {_markdown(facts['after'])}"
    if entry.name in PICTURES:
        yield ""
        yield f"![The graph before and after {entry.name}](../pictures/{PICTURES[entry.name]})"
    if facts["notes"]:
        yield ""
        yield _markdown(facts["notes"])
    yield from _patterns(entry)
    yield from _declines(facts["declines"])


def _uses(steps: Iterable[str], name: str) -> bool:
    return any(step.partition("{")[0] == name for step in steps)


def _source(entry: Entry) -> str:
    return str(Path(entry.origin.rpartition(":")[0]).relative_to(ROOT))


def _options(options: Sequence[Mapping[str, str]]) -> str:
    if not options:
        return "none"
    shown = []
    for option in options:
        default = f" = {option['default']}" if option["default"] else ""
        shown.append(f"`{option['name']}: {option['type']}{default}`")
    return _cell(", ".join(shown))


def _patterns(entry: Entry) -> Iterator[str]:
    """Yield the patterns of a pass of rules as diagrams, long ones folded away."""
    cls = pass_class(entry.name)
    if not issubclass(cls, RewritePass):
        return
    item = cls()
    for rule, (method, _) in zip(rules_of(item), item.rules(), strict=True):
        lines = [line.rstrip() for line in diagram(rule.pattern).lines()]
        says = " ".join((method.__doc__ or "").split())
        yield ""
        yield f"**Pattern `{rule.name}`.** {_markdown(says)}".rstrip()
        yield ""
        if len(lines) > _LONG:
            yield f"<details><summary>Show the diagram of {len(lines)} lines</summary>"
            yield ""
        yield from ("```text", *lines, "```")
        if len(lines) > _LONG:
            yield ""
            yield "</details>"


def _declines(declines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    reasons = [item["reason"] for item in declines if re.search(r"\w{3}", item["reason"])]
    if not reasons:
        return
    yield ""
    yield "**Says no where** (`…` stands for what is known at run time only):"
    yield ""
    yield from (f"- {_plain(reason)}" for reason in dict.fromkeys(reasons))


def pipelines_page() -> str:
    """Return a section for each named pipeline: its options, steps and expectations."""
    lines = []
    for name, item in passopt.list_passes().pipelines.items():
        facts = passopt.explain(name).to_json()
        options = ",".join(f"{key}={value}" for key, value in item.options.items())
        lines += [
            f"## {name}",
            "",
            _plain(facts["summary"]),
            "",
            f"Options with their defaults: `{name}{{{options}}}`." if options else "It has no options.",
            "",
        ]
        lines += ["| step | what it is for |", "| --- | --- |"]
        for step in facts["steps"]:
            inner = step["step"].partition("{")[0]
            lines.append(f"| [`{step['step']}`](passes.md#{inner}) | {_cell(step['summary'])} |")
        lines.append("")
        expected = [f"`{text}`" for text in facts["expectations"]]
        expected += [
            f"`{text['expectation']}` with `{text['option']}={text['value']}`" for text in facts["expected_with"]
        ]
        lines += [f"It expects {', '.join(expected)}." if expected else "It expects nothing.", ""]
    return "\n".join(lines)


def cli_page() -> str:
    """Return a section for each command: what it does, its usage, arguments and examples."""
    commands = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)).choices
    summaries = {name: commands[name].description or "" for name in COMMANDS}
    lines = ["| command | what it does |", "| --- | --- |"]
    lines += [f"| [`{name}`](#passopt-{name}) | {_cell(summary)} |" for name, summary in summaries.items()]
    for name in COMMANDS:
        lines += ["", *_command_section(name, commands[name])]
    return "\n".join(lines) + "\n"


def _command_section(name: str, command: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## passopt {name}"
    yield ""
    yield _plain(command.description or "")
    yield ""
    yield from ("```text", *_usage(command), "```", "")
    yield "| argument | what it does |"
    yield "| --- | --- |"
    for action in command._actions:
        if not isinstance(action, argparse._HelpAction):
            yield f"| {_flags(action)} | {_help(action)} |"
    examples = (command.epilog or "").partition("\n")[2]
    yield ""
    yield "Examples:" if "\n" in examples else "Example:"
    yield ""
    yield from ("```text", *textwrap.dedent(examples).splitlines(), "```")


def _usage(command: argparse.ArgumentParser) -> list[str]:
    """Return the usage as `--help` begins, whatever the width of this terminal is."""
    parts = [f"passopt {command.prog.split()[-1]}"]
    positional = [action for action in command._actions if not action.option_strings]
    for action in (*positional, *(item for item in command._actions if item.option_strings)):
        if isinstance(action, argparse._HelpAction):
            continue
        word = action.option_strings[-1] if action.option_strings else ""
        text = " ".join(filter(None, [word, _value(action)]))
        parts.append(text if action.required or not action.option_strings else f"[{text}]")
    wrapped = textwrap.wrap(
        "\0".join(part.replace(" ", "\1") for part in parts).replace("\0", " "),
        _WIDTH,
        subsequent_indent=" " * 4,
        break_on_hyphens=False,
    )
    return [line.replace("\1", " ") for line in wrapped]


def _value(action: argparse.Action) -> str:
    """Return what stands behind the flag: `DIR`, `{a,b}`, `[PASS]`; nothing for a switch."""
    if action.nargs == 0:
        return ""
    name = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper())
    return f"[{name}]" if action.nargs == "?" else str(name)


def _flags(action: argparse.Action) -> str:
    value = _value(action)
    if not action.option_strings:
        return f"`{value}`"
    return _cell(", ".join(f"`{flag}{f' {value}' if value else ''}`" for flag in action.option_strings))


def _help(action: argparse.Action) -> str:
    text = (action.help or "") % {**vars(action), "prog": "passopt"}
    required = " (must be given)" if action.required and action.option_strings else ""
    return _cell(_plain(text)) + required


def _markdown(text: str) -> str:
    """Text of a docstring as Markdown: ``code`` becomes `code`, everything else means itself."""
    pieces = re.split(r"``(.+?)``", text, flags=re.DOTALL)
    return "".join(f"`{' '.join(piece.split())}`" if index % 2 else _plain(piece) for index, piece in enumerate(pieces))


def _plain(text: str) -> str:
    """Text outside of `code` with the characters escaped that Markdown would take for markup."""
    pieces = re.split(r"(`[^`]+`)", text)
    return "".join(
        piece if index % 2 else re.sub(r"([*_<>{}\[\]$])", r"\\\1", piece) for index, piece in enumerate(pieces)
    )


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def escape_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Let bars and backslashes of a docstring mean themselves, as `max|a - b|` does; autodoc calls this.

    Args:
        app: The Sphinx application.
        what: The kind of object.
        name: Its full name.
        obj: The object.
        options: The options of the directive.
        lines: The docstring, changed in place.
    """
    code = False
    for index, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.strip() and not indent:
            code = False
        if not code and not line.lstrip().startswith((">>>", "...")):
            pieces = re.split(r"(``.+?``|`[^`]+`)", line)
            lines[index] = "".join(
                piece if place % 2 else re.sub(r"\|(?=\S)|(?<=\S)\|", r"\\|", piece)
                for place, piece in enumerate(pieces)
            )
        if line.rstrip().endswith("::"):
            code = True


def prepare() -> None:
    """Write the pages, and the pictures of rooms that changed, before a build."""
    import room_pictures

    write()
    room_pictures.main([])


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx: write the pages when a build begins, and escape docstrings.

    Args:
        app: The Sphinx application.

    Returns:
        That the extension may run in parallel.
    """
    app.connect("builder-inited", lambda _: prepare())
    app.connect("autodoc-process-docstring", escape_docstring)
    return {"version": passopt.__version__, "parallel_read_safe": True, "parallel_write_safe": True}


def main(arguments: Sequence[str]) -> int:
    """Write the pages, and print their paths.

    Args:
        arguments: The folder, if it is another one.

    Returns:
        The exit code, 0.
    """
    for path in write(Path(arguments[0]) if arguments else FOLDER):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
