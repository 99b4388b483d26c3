"""Write the page about the trained model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from process_usage import Usage
from real.inputs import NEW_TOKENS, PACKAGE, QUESTIONS, TEXTS, WINDOW, WINDOWS, source_of_text
from tables import processor, table


@dataclasses.dataclass
class Step:
    """A command with what it used, and the bytes of its output; 0 if it has none."""

    command: str
    usage: Usage
    nbytes: int


@dataclasses.dataclass
class Measured:
    """What was found for one model: its file, in onnxruntime or compiled, and the process that ran it."""

    name: str
    engine: str
    nbytes: int
    found: dict[str, Any]
    usage: Usage


def page(steps: Sequence[Step], rows: Sequence[Measured]) -> str:
    """Return the page with all figures."""
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("transformers", "torch", "onnxruntime", "apache-tvm", "gguf")
    )
    usages = [step.usage for step in steps] + [row.usage for row in rows]
    return PAGE_TEXT.format(
        processor=processor(),
        versions=versions,
        package=PACKAGE,
        text=source_of_text(),
        windows=WINDOWS,
        window=WINDOW,
        prompts=len(QUESTIONS) + len(TEXTS),
        questions=len(QUESTIONS),
        new=NEW_TOKENS,
        quality=_quality(rows),
        steps=_steps(steps),
        largest=max(step.usage.peak for step in steps) / 1e9,
        minutes=sum(usage.cpu for usage in usages) / 60,
    )


def _quality(rows: Sequence[Measured]) -> str:
    header = "model", "run by", "MB", "perplexity", "KL mean", "KL 99 %", "top-1", "equal prompts", "equal tokens"
    return table(header, [_row(row) for row in rows])


def _row(row: Measured) -> list[str]:
    found = row.found
    tokens = ["", ""]
    if "equal" in found:
        tokens = [f"{found['equal']} of {found['prompts']}", f"{found['equal tokens']} of {found['tokens']}"]
    figures = [
        f"{found['perplexity']:.4f}",
        f"{found['kl']:.1e}",
        f"{found['kl99']:.1e}",
        f"{100 * found['top1']:.1f} %",
    ]
    return [row.name, row.engine, f"{row.nbytes / 1e6:,.0f}", *figures, *tokens]


def _steps(steps: Sequence[Step]) -> str:
    return table(("command", "CPU s", "peak MB", "output MB"), [_step(step) for step in steps])


def _step(step: Step) -> list[str]:
    size = f"{step.nbytes / 1e6:,.0f}" if step.nbytes else ""
    return [f"`{step.command}`", f"{step.usage.cpu:.1f}", f"{step.usage.peak / 1e6:,.0f}", size]


PAGE_TEXT = """# A trained model

This page takes SmolLM2-135M-Instruct, a Llama with 9 heads on 3 key/value heads and a tied head, from a GGUF file
(Q4_1) through export, passes, compilation and generation, and compares every result with transformers in fp32, which
reads the same file by code of its own. It was measured on {processor} with {versions}.
The file comes from the package {package} on PyPI. `make real` repeats the measurement, writes this page, and fails
where a figure is beyond its bar.

## What the passes do to the model

{quality}
- `perplexity` and the KL divergence are over {windows} windows of {window} tokens of {text}.
  The divergence is that of the next token's probabilities from those of transformers, in nats: its mean over all
  positions, and the value that 99 % of the positions do not exceed. `top-1` is the share of positions with the same
  most likely token.
- `equal prompts` counts the prompts whose greedy continuation of at most {new} tokens is that of transformers:
  {questions} questions in the model's chat format, and as many beginnings of texts. All {prompts} run in one padded
  batch. `equal tokens` counts the tokens before the first that differs; after that, two continuations are two texts.
- Bars: fusing and sharding change rounding only, so all greedy tokens are equal, and the mean divergence is at most
  1e-6. int8 may cost what its passes declare, in divergence and in `top-1`. `passopt verify` holds every result to it
  as well, at the same text.

## Time, memory and size

{steps}
`peak MB` is the largest number of resident bytes, mapped files included; the most was {largest:.2f} GB. Everything on
this page took {minutes:.1f} minutes of CPU time.
"""
