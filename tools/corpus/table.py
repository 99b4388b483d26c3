"""Count outcomes by step, and write the table and the page of the corpus."""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from outcomes import FAULTS, OUTCOMES
from workers import Row

#: How many cases a list of faults or refusals names before it only counts.
_NAMED = 3


def table(rows: Sequence[Row]) -> str:
    """Return the table of steps by outcomes, in Markdown; columns without any number are left out."""
    counts = collections.Counter((row[2], row[3]) for row in rows)
    steps = list(dict.fromkeys(row[2] for row in rows))
    kinds = [kind for kind in OUTCOMES if any(counts[step, kind] for step in steps)]
    lines = ["| step | " + " | ".join(kinds) + " |", "| --- |" + " ---: |" * len(kinds)]
    lines += [f"| {step} | " + " | ".join(str(counts[step, kind] or "") for kind in kinds) + " |" for step in steps]
    return "\n".join(lines) + "\n"


def faults(rows: Sequence[Row], kinds: Sequence[str] = FAULTS) -> str:
    """Return a list of outcomes of some kinds, equal ones together, with the names of steps and of a few cases."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row[3] in kinds:
            groups.setdefault((row[3], _general(row[4])), []).append(row)
    lines = []
    for (kind, detail), found in sorted(groups.items(), key=lambda item: -len(item[1])):
        steps = dict.fromkeys(row[2] for row in found)
        cases = list(dict.fromkeys(f"{row[0]}/{row[1]}" for row in found))
        lines.append(f"{kind} × {len(found)}: {detail}")
        lines.append(f"    steps: {', '.join(steps)}")
        lines.append(
            f"    cases: {', '.join(cases[:_NAMED])}{f' and {len(cases) - _NAMED} more' * (len(cases) > _NAMED)}"
        )
    return "".join(f"{line}\n" for line in lines)


def _general(detail: str) -> str:
    """Return a message without names, numbers and the pass that it names, so that equal reasons count as one."""
    text = re.sub(r"^(\w+Error: )[a-z0-9-]+( left a broken graph)?[^:]*: ", r"\1", detail.strip().partition("\n")[0])
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", text.partition(" (passes before it")[0])
    return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "#", text)[:200]


def page(rows: Sequence[Row], part: str = "", absent: Sequence[str] = ()) -> str:
    """Return the page docs/measured/corpus.md around the table, and the table of an earlier state if there is one."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("onnx", "onnx-ir", "onnxruntime", "onnxsim"))
    models = len({row[0] for row in rows})
    which = f"the part {part} of the corpus: {models} models" if part else f"{models} models"
    missing = f" The files of {', '.join(absent)} could not be had." if absent else ""
    return f"""# Corpus: every pass over models that nobody here wrote

This page counts what every pass and pipeline does to {which}. They are ONNX's backend
models, the graphs that the tests of onnxruntime and onnxscript fuse (rebuilt), and files of packages, each written in
several ways that mean the same. It was measured with {versions};
`make corpus` repeats the measurement and writes this page.{missing}

Variants: as it is (plain), every length a symbol (symbolic), all inputs as constants (constants), all but the first
(parameters), those in a file of their own (external), the graph inside both branches of an If (body), as a local
function (function), and with the default domain called `ai.onnx` (alias). Numbers are compared in onnxruntime without
its own rewrites, or in ONNX's reference evaluator, which computes bf16 in fp32, where onnxruntime does not run the
original. A number that 16 bits do not hold may become infinite there. Symbolic models are fed
other lengths too. Of these, lengths count only at which the original has sure outputs: onnxruntime returns memory that
it has not written for some (RotaryEmbedding of an odd size, Scan over nothing), which is the same on both
sides here, ends the process for some (STFT, InstanceNormalization in fp16), and its Attention of opset 23 refuses an
empty query. The reference gets one second for
them. A variant that is read as the very same model as one before it shares the outcomes of its steps.

| outcome | means |
| --- | --- |
| unchanged | the pass left the model as it was |
| ok | equal dtypes and shapes, and numbers within the declared accuracy |
| not comparable | neither runs both; the checker accepts the result, and onnxruntime where it accepts the original |
| sensitive | no lossy pass, and a change of no more than one rounding of the model's inputs makes |
| beyond | a lossy pass lost up to ten times what it declares, or what rounding all numbers loses |
| refused | an error with a text for the user |
| unstable | a second run changes the result again |
| wrong, invalid, crash, hang | defects: other results, a file that is refused, an internal error, no end |
| not read | passopt refuses to read the model |

{table(rows)}{_before()}"""


def _before() -> str:
    """Return the section about the state that the corpus found first."""
    path = Path(__file__).with_name("before.md")
    return f"\n{path.read_text(encoding='utf-8')}" if path.exists() else ""
