"""Evaluate models: `passopt.evaluate` on texts and questions, and `passopt.lm_eval_model` for lm-eval."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import onnx_ir

from passopt.api import checked
from passopt.api.model import Model, ModelLike
from passopt.evaluation.candidates import Candidate, candidate_of
from passopt.evaluation.evaluate import Settings
from passopt.evaluation.evaluate import evaluate as run
from passopt.evaluation.harness import HarnessModel, lm_eval_class
from passopt.evaluation.question_scores import QuestionTask, encode_questions, few_notes
from passopt.evaluation.questions import QuestionSet, read_ceval_questions, read_choices
from passopt.evaluation.reference_store import DTYPES, StoredDtype
from passopt.evaluation.report import EvalReport, make_report
from passopt.evaluation.text_scores import TextTask, spread_notes
from passopt.evaluation.text_tokens import TextReader
from passopt.frontends.calibration.documents import Source, parse_source
from passopt.generation.tokenizer import load_tokenizer
from passopt.ir.errors import ModelError, UsageError
from passopt.predictions.windows import cut_windows
from passopt.reporting.reporter import SILENT, Reporter
from passopt.targets.tvm.engine.cores import count_cores

Paths: TypeAlias = "Path | str | Sequence[Path | str]"

#: The usual window of perplexities in the literature on quantisation.
WINDOW = 2048


def evaluate(
    models: ModelLike | Sequence[ModelLike],
    *,
    reference: ModelLike | None = None,
    text: Paths = (),
    c4: Paths = (),
    data: Paths = (),
    ceval: Path | str | None = None,
    choices: Paths = (),
    tokenizer: Path | str | None = None,
    window: int | None = None,
    stride: int | None = None,
    bos: bool = False,
    max_tokens: int = 16 * WINDOW,
    split: str = "val",
    shots: int = 5,
    limit: int | None = None,
    cache: Path | str | None = None,
    cache_dtype: StoredDtype = "fp16",
    threads: int | None = None,
    reporter: Reporter = SILENT,
) -> EvalReport:
    """Measure how well models predict texts and answer questions, and how far they are from a reference.

    Models run one after the other, so one is in memory at a time. The reference's predictions are kept on disk: for
    each predicted token as many numbers as the vocabulary has.

    Args:
        models: Models to compare: graphs, files, folders, folders of ranks, or compiled folders.
        reference: The model that the others are compared with; None for the first of them.
        text: Plain UTF-8 texts, each of which is tokenised as a whole.
        c4: Files of C4, JSON lines with a key "text".
        data: Other sets, such as `alpaca:alpaca_data_cleaned.json`, in the formats that calibration reads.
        ceval: `ceval-exam.zip`.
        choices: Multiple-choice questions as JSON lines.
        tokenizer: A folder, tokenizer.json or tokenizer.model; None for the one beside the reference.
        window: The tokens that a model reads at once; None for 2048, or all positions where there are fewer.
        stride: The distance from window to window; None for disjoint windows. Smaller ones give every token more
            context, and take more time.
        bos: Whether the ids that begin a text, such as that of `<s>`, begin every window.
        max_tokens: The number of tokens to use from the beginning of each text.
        split: The split of C-Eval that is asked: val, or one whose answers are known to you.
        shots: The number of examples before each question of C-Eval.
        limit: The largest number of questions of each subject or file; None for all.
        cache: A folder in which the reference's predictions stay for the next evaluation, and from which an interrupted
            one goes on; None for a temporary folder.
        cache_dtype: fp16, or fp32 for twice the bytes; fp16 moves a divergence by 1e-7 and 1e-5 of it.
        threads: The number of threads; None for the cores of this machine.
        reporter: Is told about progress.

    Returns:
        Figures of each model with their standard errors. The first model is the reference.

    Raises:
        ModelError: A model, the tokenizer or a data set cannot be read or is damaged, or logits are not finite.
        UsageError: Models, tokenizer, windows and texts do not fit together, or there is nothing to evaluate on.

    Example:
        >>> print(passopt.evaluate(["fp32", "int8", "compiled"], text="wiki.txt"))
    """
    _check(window, stride, max_tokens, shots, limit, threads, split, cache_dtype)
    count = threads if threads is not None else count_cores()
    candidates = [candidate_for(model, count) for model in _ordered(models, reference)]
    sources = [
        *(Source("text", _file(path)) for path in _paths("text", text)),
        *(Source("c4", _file(path)) for path in _paths("c4", c4)),
        *(parse_source(str(path)) for path in _paths("data", data)),
    ]
    asked = list(_paths("choices", choices))
    if not sources and not asked and ceval is None:
        raise UsageError("nothing to evaluate on: give a `text`, `c4`, `data`, `ceval` or `choices`")
    reader = reader_for(candidates, tokenizer)
    positions = min((model.max_positions for model in candidates if model.max_positions is not None), default=None)
    texts = _texts(sources, reader, _window(window, candidates, positions), stride, max_tokens, bos=bos)
    sets: list[QuestionSet] = []
    if ceval is not None:
        sets.append(read_ceval_questions(checked.path("ceval", ceval), split=split, shots=shots, limit=limit))
    sets += [read_choices(path, limit=limit) for path in asked]
    questions = [encode_questions(item, reader, positions) for item in sets]
    _check_vocabularies(candidates, texts, questions)
    settings = Settings(checked.path("cache", cache) if cache is not None else None, cache_dtype, reporter)
    figures = run(candidates, texts, questions, settings)
    notes = [note for model in candidates for note in model.notes]
    notes += [*spread_notes(texts), *few_notes(questions)]
    return make_report(candidates, texts, questions, figures, cache_dtype, dict.fromkeys(notes))


def lm_eval_model(model: ModelLike, *, tokenizer: Path | str | None = None, threads: int | None = None) -> HarnessModel:
    """Load a model as one that `lm_eval.simple_evaluate` takes.

    Args:
        model: A graph, a file, a folder, a folder of ranks, or a compiled folder.
        tokenizer: A folder, tokenizer.json or tokenizer.model; None for the one beside the model.
        threads: The number of threads; None for the cores of this machine.

    Returns:
        An instance of lm-eval's `LM`, with its weights loaded.

    Raises:
        ModelError: The model or its tokenizer cannot be read or is damaged.
        UsageError: lm-eval is not installed, or the model has no tokenizer.

    Example:
        >>> lm_eval.simple_evaluate(model=passopt.lm_eval_model("compiled"), tasks=["arc_easy"])
    """
    checked.whole("threads", threads, 1)
    made = lm_eval_class()
    candidate = candidate_for(model, threads if threads is not None else count_cores())
    return made(candidate, reader_for([candidate], tokenizer))


def _check(
    window: object,
    stride: object,
    max_tokens: object,
    shots: object,
    limit: object,
    threads: object,
    split: object,
    cache_dtype: object,
) -> None:
    checked.whole("window", window, 2)
    checked.whole("stride", stride, 1)
    checked.whole("max_tokens", max_tokens, 2)
    checked.whole("shots", shots, 0)
    checked.whole("limit", limit, 1)
    checked.whole("threads", threads, 1)
    checked.one_of("split", split, ("dev", "val", "test"))
    checked.one_of("cache_dtype", cache_dtype, tuple(DTYPES))


def _paths(name: str, value: Paths) -> Iterable[Path]:
    listed = [value] if isinstance(value, (str, Path)) else value
    return [checked.path(name, item) for item in listed]


def _file(path: Path) -> Path:
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file; a text is read from a local file")
    return path


def _ordered(models: ModelLike | Sequence[ModelLike], reference: ModelLike | None) -> list[ModelLike]:
    """Return the models with the reference first, which is put in unless it is one of them."""
    found = [models] if isinstance(models, (str, Path, Model, onnx_ir.Model)) else list(models)
    if not found:
        raise UsageError("there is no model to evaluate")
    if reference is None:
        return found
    place = next((index for index, model in enumerate(found) if _same(model, reference)), None)
    if place is not None:
        found.pop(place)
    return [reference, *found]


def _same(one: ModelLike, other: ModelLike) -> bool:
    if isinstance(one, (str, Path)) and isinstance(other, (str, Path)):
        return Path(one).absolute() == Path(other).absolute()
    return one is other


def candidate_for(model: ModelLike, threads: int) -> Candidate:
    """Return what is known of a model before its weights are loaded.

    Raises:
        ModelError: If there is no such model, or it is no decoder.
        UsageError: If it is neither a model nor a path.
    """
    if isinstance(model, (str, Path)):
        return candidate_of(str(model), Path(model), threads=threads)
    if isinstance(model, Model):
        path = model.path if not model.changes else None  # a graph that passes have changed is in no file
        return candidate_of(str(model.path or "model"), model.ir, threads=threads, path=path)
    if isinstance(model, onnx_ir.Model):
        return candidate_of(model.graph.name or "model", model, threads=threads)
    raise UsageError(f"a model is a passopt.Model, a graph of onnx-ir or a path, not {type(model).__name__}")


def reader_for(candidates: Sequence[Candidate], named: Path | str | None) -> TextReader:
    """Return the tokenizer that was named, or the one beside the first model.

    Raises:
        ModelError: If the tokenizer is damaged.
        UsageError: If there is none.
    """
    if named is not None:
        path = checked.path("tokenizer", named)
        return TextReader.of(load_tokenizer(path), path if path.is_dir() else path.parent)
    folder = candidates[0].tokenizer_folder
    if folder is None:
        raise UsageError("a model in memory has no tokenizer beside it; name one with `tokenizer`")
    try:
        return TextReader.of(load_tokenizer(folder), folder)
    except ModelError as error:
        if "no tokenizer" not in str(error):
            raise
        raise UsageError(
            f"{folder}: has no tokenizer.json and no tokenizer.model; name one with `tokenizer`"
        ) from error


def _window(window: int | None, candidates: Sequence[Candidate], positions: int | None) -> int:
    if window is None:
        return WINDOW if positions is None else min(WINDOW, positions)
    if positions is not None and window > positions:
        least = next(model for model in candidates if model.max_positions == positions)
        raise UsageError(f"`window` is {window}, and {least.name} has {positions} positions; give a smaller one")
    return window


def _texts(
    sources: Sequence[Source], reader: TextReader, window: int, stride: int | None, most: int, *, bos: bool
) -> list[TextTask]:
    distance = stride if stride is not None else window
    if distance > window:
        raise UsageError(f"`stride` is {distance}, more than `window`, which is {window}: tokens would be left out")
    begin = reader.begin if bos else ()
    room = window - len(begin)
    if room < 2:
        raise UsageError(f"`window` is {window}: too short for the {len(begin)} ids that begin it, and two more")
    found = []
    for source in sources:
        text = reader.read(source, most, with_begin=not bos)
        if len(text.ids) < room:
            short = f"`max_tokens` allows {most}" if text.is_cut else f"it has {len(text.ids):,} tokens"
            raise UsageError(
                f"{source.path}: is shorter than a window of {window:,} tokens: {short}; give more text, or a smaller "
                f"`window`"
            )
        windows = cut_windows(len(text.ids), room, min(distance, room), known=len(begin))
        found.append(TextTask(text, tuple(windows), begin, window, min(distance, room) + len(begin)))
    return found


def _check_vocabularies(
    candidates: Sequence[Candidate], texts: Sequence[TextTask], questions: Sequence[QuestionTask]
) -> None:
    """Raise UsageError where a model's vocabulary fits neither the tokenizer nor the reference's."""
    pieces = [task.text.ids for task in texts]
    pieces += [
        ids for task in questions for choices in task.encoded for one in choices for ids in (one.context, one.scored)
    ]
    largest = max(int(ids.max()) for ids in pieces)
    for model in candidates:
        if largest >= model.vocab:
            raise UsageError(
                f"{model.name}: token id {largest} is outside of its vocabulary (0 to {model.vocab - 1}); the "
                f"tokenizer is another model's; name the right one with `tokenizer`"
            )
        if texts and model.vocab != candidates[0].vocab:
            raise UsageError(
                f"{model.name}: has {model.vocab:,} logits, the reference {candidates[0].name} has "
                f"{candidates[0].vocab:,}: their predictions cannot be compared; evaluate it by itself"
            )
