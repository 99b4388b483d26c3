"""Let lm-eval drive a model: `passopt.lm_eval_model`."""

from __future__ import annotations

from pathlib import Path

from passopt.api import checked
from passopt.api.evaluate import candidate_for, reader_for
from passopt.api.model import ModelLike
from passopt.evaluation.harness import HarnessModel, lm_eval_class
from passopt.targets.tvm.engine.cores import count_cores


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
