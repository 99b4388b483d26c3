"""Hold the result of an evaluation: figures of each model on each text and set of questions, as tables and JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from passopt.evaluation.candidates import Candidate
from passopt.evaluation.evaluate import ModelFigures
from passopt.evaluation.plot import Panel, Spot, draw_plot
from passopt.evaluation.question_scores import QuestionFigures, QuestionTask
from passopt.evaluation.text_scores import BLOCK, TextFigures, TextTask
from passopt.ir.errors import UsageError
from passopt.predictions.standard_errors import Estimate
from passopt.reporting.result import Result

#: Figures below this are written with an exponent.
_SMALL = 1e-3


@dataclasses.dataclass(frozen=True)
class ModelReport:
    """One model with its figures.

    Attributes:
        name: The model, as it was named.
        runs_in: "onnxruntime", or "compiled" for a compiled folder.
        weight_bytes: The bytes of its weights as they are stored.
        texts: Its figures on each text.
        questions: Its figures on each set of questions.
    """

    name: str
    runs_in: str
    weight_bytes: int
    texts: tuple[TextFigures, ...]
    questions: tuple[QuestionFigures, ...]


@dataclasses.dataclass(frozen=True)
class TextSummary:
    """One text, as it was used.

    Attributes:
        name: Its file.
        tokens: The number of its tokens that were used.
        is_cut: Whether there are more.
        windows: The number of windows.
        window: The length of a window in tokens.
        stride: The distance from window to window; that of disjoint ones is their length.
        scored: The number of tokens that were predicted.
        digest: The blake3 digest of the token ids.
    """

    name: str
    tokens: int
    is_cut: bool
    windows: int
    window: int
    stride: int
    scored: int
    digest: str

    @classmethod
    def of(cls, task: TextTask) -> TextSummary:
        """Return the summary of a text in windows."""
        text, count = task.text, len(task.windows)
        tokens, digest = len(text.ids), text.digest()
        return cls(text.name, tokens, text.is_cut, count, task.window, task.stride, task.scored, digest)


@dataclasses.dataclass(frozen=True)
class QuestionSummary:
    """One set of questions: its file and how many there are, and whether it is C-Eval's."""

    name: str
    count: int
    is_ceval: bool

    @classmethod
    def of(cls, task: QuestionTask) -> QuestionSummary:
        """Return the summary of a set of questions."""
        return cls(task.of.name, len(task.of.questions), task.of.is_ceval)


@dataclasses.dataclass(frozen=True, repr=False)
class EvalReport(Result):
    """The figures of an evaluation. The first model is the reference, with which the others are compared.

    Attributes:
        models: The models with their figures.
        texts: The texts, in the order of each model's figures.
        questions: The sets of questions, in the same way.
        kept: The dtype in which the reference's predictions were kept; "" if nothing was compared with them.
        notes: What else there is to know, such as figures that are noise.
    """

    models: tuple[ModelReport, ...]
    texts: tuple[TextSummary, ...]
    questions: tuple[QuestionSummary, ...]
    kept: str
    notes: tuple[str, ...]

    def to_text(self) -> str:
        parts = [self._text(index) for index in range(len(self.texts))]
        parts += [self._questions(index) for index in range(len(self.questions))]
        body = "\n\n".join(parts)
        return "\n\n".join([body, "\n".join(self.notes)]) if self.notes else body

    def to_json(self) -> dict[str, Any]:
        return {
            "reference": self.models[0].name,
            "kept": self.kept or None,
            "block": BLOCK,
            "texts": [dataclasses.asdict(text) for text in self.texts],
            "questions": [dataclasses.asdict(questions) for questions in self.questions],
            "models": [_json(model) for model in self.models],
            "notes": list(self.notes),
        }

    def to_svg(self) -> str:
        """Return a picture of KL divergence against the bytes of the weights, with a panel for each text.

        Raises:
            UsageError: If there is no text, or no model besides the reference.
        """
        check_plot(len(self.models), len(self.texts))
        panels = []
        for index, text in enumerate(self.texts):
            spots = [
                Spot(model.name, model.weight_bytes, model.texts[index].kl_mean or Estimate(0.0))
                for model in self.models
            ]
            panels.append(Panel(f"{text.name}: {text.scored:,} tokens predicted", spots[0], spots[1:]))
        return draw_plot(panels)

    def _text(self, index: int) -> str:
        text = self.texts[index]
        how = "disjoint" if text.stride == text.window else f"{text.stride:,} apart"
        more = ", which goes on" if text.is_cut else ""
        compared = f"; KL in nats, from {self.models[0].name} as {self.kept}" if len(self.models) > 1 else ""
        head = [
            f"{text.name}{more}: {text.tokens:,} tokens, windows of {text.window:,}, {how}: {text.windows:,}; "
            f"{text.scored:,} tokens predicted",
            f"± one standard error, over blocks of {BLOCK} tokens{compared}",
            "",
        ]
        columns = ["model", "weight bytes", "perplexity", "−log p"]
        if len(self.models) > 1:
            columns += ["more", "KL mean", "KL median", "KL 99 %", "top-1 %"]
        rows = [_text_cells(model, model.texts[index], len(columns)) for model in self.models]
        return "\n".join([*head, *_table([columns, *rows])])

    def _questions(self, index: int) -> str:
        questions = self.questions[index]
        first = self.models[0].questions[index]
        head = [f"{questions.name}: {questions.count:,} questions, answered by likelihood; ± one standard error", ""]
        columns = ["model", "weight bytes", "accuracy %", "by length %"]
        if len(self.models) > 1:
            columns += ["more %", "same answer %"]
        rows = [_question_cells(model, model.questions[index], len(columns)) for model in self.models]
        lines = [*head, *_table([columns, *rows])]
        for title, part in (("category", "by_category"), ("subject", "by_subject")):
            names = list(getattr(first, part))
            if not names:
                continue
            parts = [getattr(model.questions[index], part) for model in self.models]
            below = [[name, *(_percent(found[name]) for found in parts)] for name in names]
            if part == "by_subject":
                means = [model.questions[index].mean_of_subjects for model in self.models]
                below.append(["mean of subjects", *(_percent(mean) for mean in means)])
            lines += ["", *_table([[title, *(model.name for model in self.models)], *below])]
        return "\n".join(lines)


def check_plot(models: int, texts: int) -> None:
    """Raise UsageError unless there are models and texts to draw."""
    if models < 2 or not texts:
        raise UsageError("a plot shows divergence from a reference on a text: give two models or more, and a `text`")


def make_report(
    models: Sequence[Candidate],
    texts: Sequence[TextTask],
    questions: Sequence[QuestionTask],
    figures: Sequence[ModelFigures],
    kept: str,
    notes: Iterable[str],
) -> EvalReport:
    """Return the report of an evaluation."""
    reports = [
        ModelReport(model.name, model.runs_in, model.weight_bytes, found.texts, found.questions)
        for model, found in zip(models, figures, strict=True)
    ]
    return EvalReport(
        tuple(reports),
        tuple(map(TextSummary.of, texts)),
        tuple(map(QuestionSummary.of, questions)),
        kept if len(models) > 1 and texts else "",
        tuple(notes),
    )


def _text_cells(model: ModelReport, figures: TextFigures, columns: int) -> list[str]:
    own = [model.name, f"{model.weight_bytes:,}", shown(figures.perplexity), shown(figures.surprise)]
    compared = [
        shown(figures.more_surprise, sign=True),
        shown(figures.kl_mean),
        shown(figures.kl_median),
        shown(figures.kl_high),
        _percent(figures.top1),
    ]
    return [*own, *compared][:columns]


def _question_cells(model: ModelReport, figures: QuestionFigures, columns: int) -> list[str]:
    own = [model.name, f"{model.weight_bytes:,}", _percent(figures.accuracy), _percent(figures.normalised)]
    return [*own, _percent(figures.more, sign=True), _percent(figures.same)][:columns]


def _percent(estimate: Estimate | None, *, sign: bool = False) -> str:
    return shown(estimate and Estimate(100 * estimate.value, 100 * estimate.error), sign=sign, least=1)


def shown(estimate: Estimate | None, *, sign: bool = False, least: int = 0) -> str:
    """Return a figure with as many digits as its standard error allows, or a dash if there is none.

    Args:
        estimate: The figure.
        sign: Whether a plus sign is written.
        least: The least number of digits behind the point.
    """
    if estimate is None:
        return "-"
    plus = "+" if sign else ""
    value, error = estimate.value, estimate.error
    if not math.isfinite(value):
        return "infinite"
    if not math.isfinite(error):
        return f"{value:{plus}.4g} ± ?"
    if not error:
        return f"{value:{plus}.4g} ± 0"
    size = max(abs(value), error)
    exponent = math.floor(math.log10(size)) if size < _SMALL else 0
    value, error = value / 10.0**exponent, error / 10.0**exponent
    # One digit of the error is enough, unless that is a small one.
    digits = min(max(math.ceil(-math.log10(error / 3)), least, 0), 12)
    text = f"{value:{plus}.{digits}f} ± {error:.{digits}f}"
    return f"({text})e{exponent}" if exponent else text


def _table(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return [
        "  " + "  ".join([line[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    ]


def _json(value: Any) -> Any:
    """Return a result as dictionaries and lists; numbers that are not finite become null."""
    if isinstance(value, Estimate):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_json(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {field.name: _json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value
