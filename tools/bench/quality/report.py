"""Write the page about ways of quantising, and draw divergence against bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from passopt.evaluation.plot import Panel, Spot, draw_plot
from passopt.evaluation.report import shown
from passopt.predictions.standard_errors import Estimate
from process_usage import Usage
from quality.variants import CALIBRATIONS, GOALS
from real.inputs import PACKAGE
from tables import processor, table


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found for one way of quantising.

    Attributes:
        name: What the table calls it.
        passes: Its pipeline over the fused model.
        found: The model's part of what `passopt eval --json` prints.
        usage: What running the passes took.
        cache: The KV cache is in 8 bits, of which the weights' bytes say nothing.
    """

    name: str
    passes: str
    found: Mapping[str, Any]
    usage: Usage
    cache: bool = False


def page(rows: Sequence[Row], calibrations: Mapping[str, Usage], tokens: int) -> str:
    """Return the page with all figures."""
    names = [_name(text) for text in range(len(rows[0].found["texts"]))]
    versions = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "numpy"))
    return PAGE_TEXT.format(
        package=PACKAGE,
        processor=processor(),
        versions=versions,
        tokens=tokens,
        table=table(
            ("way", "MB", *(f"{what}, {name}" for name in names for what in ("KL", "KL 99 %", "top-1", "perplexity"))),
            [_cells(row) for row in rows],
        ),
        pipelines=table(("way", "passes after `fuse`"), [(row.name, f"`{row.passes}`") for row in rows[1:]]),
        calibrations=table(
            ("calibration", "passes before", "options", "CPU s", "peak MB"),
            [_calibration(name, usage) for name, usage in calibrations.items()],
        ),
        goals=table(("way", "against", "KL at most"), [_goal(goal) for goal in GOALS]),
    )


def picture(rows: Sequence[Row]) -> str:
    """Return the SVG picture: a panel for each text."""
    panels = []
    for index in range(len(rows[0].found["texts"])):
        spots = [_spot(row, index) for row in rows if not row.cache]
        panels.append(Panel(_name(index), spots[0], spots[1:]))
    return draw_plot(panels)


def _name(index: int) -> str:
    return ("the book", "Python's documentation")[index]


def _spot(row: Row, index: int) -> Spot:
    kl = row.found["texts"][index]["kl_mean"]
    return Spot(row.name, row.found["weight_bytes"], _estimate(kl) or Estimate(0.0))


def _estimate(found: Mapping[str, float] | None) -> Estimate | None:
    return None if found is None else Estimate(found["value"], found["error"])


def _cells(row: Row) -> list[str]:
    cells = [row.name, f"{row.found['weight_bytes'] / 1e6:,.0f}"]
    for text in row.found["texts"]:
        top = _estimate(text["top1"])
        share = None if top is None else Estimate(100 * top.value, 100 * top.error)
        cells += [shown(_estimate(text["kl_mean"])), shown(_estimate(text["kl_high"])), shown(share, least=1)]
        cells.append(shown(_estimate(text["perplexity"])))
    return cells


def _calibration(name: str, usage: Usage) -> list[str]:
    about = CALIBRATIONS[name]
    passes = f"`{about.passes}`" if about.passes else "—"
    return [name, passes, f"`{' '.join(about.options)}`", f"{usage.cpu:.0f}", f"{usage.peak / 1e6:,.0f}"]


def _goal(goal: Any) -> list[str]:
    most = f"{goal.most:g} ×" if goal.than else f"{goal.most:g}"
    return [goal.variant, goal.than or "—", most]


PAGE_TEXT = """# Which quantisation?

This page shows what each way of quantising costs a trained model, so that you can choose one. `KL` is the mean
divergence of the next token's probabilities from those of the model in fp32, in nats, ± one standard error; `KL 99 %`
is what 99 % of the positions do not exceed, and `top-1` the share of positions with the same most likely token, in
percent. The model is SmolLM2-135M-Instruct, a Llama with 30 layers, from {package}. Small models suffer more than large
ones: read the order of the ways, and measure your own model with `passopt eval`.

![KL divergence against the bytes of the weights](quantisation.svg)

{table}
`MB` is what the weights take, with embedding and head, which stay in fp32 here. An int8 cache changes no weight.

## What to take

- **Weights alone** (decoding one sequence is as fast as the weights are read): `int8` by GPTQ. It needs a calibration,
  and loses a fraction of what rounding loses. Without any data, `int8` as it is.
- **Weights and activations** (prefill of long prompts, large batches): rotate and smooth first. Without data, rotate.
  Plain W8A8 loses an order of magnitude more than weights alone: single channels of the activations are
  large, and take the precision of all others with them. Fixed ranges of activations, which other tools offer, lose
  another order of magnitude and more, so passopt finds the range of every token while it runs.
- **Long sequences or many of them**: add `int8-cache`. It takes half the memory of a cache in fp16, and costs less than
  anything else on this page.
- **4 bits** if memory is what decides: always by GPTQ and in groups.

## How it was measured

{pipelines}
All calibrations read {tokens:,} tokens of parts of both texts that are not measured:

{calibrations}
The texts are an English book of 1704 and Python's own documentation. The measurement ran on {processor} with
{versions}. `make quality` repeats it, writes this page and the picture, and fails where a way exceeds its bar:

{goals}"""
