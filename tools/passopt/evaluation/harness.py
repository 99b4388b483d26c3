"""Answer the three kinds of requests that evaluation harnesses such as lm-eval make of a model."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from passopt.evaluation.candidates import Candidate, gives_last_only
from passopt.evaluation.likelihood import Continuation, encode_continuation, likelihoods
from passopt.evaluation.scored_rows import Scorer
from passopt.evaluation.text_tokens import TextReader
from passopt.generation.loop import generate
from passopt.generation.sampling import Sampling
from passopt.generation.settings import read_settings
from passopt.ir.errors import UsageError

#: The longest window and the number of new tokens where neither the model nor the request says one.
_WINDOW, _NEW_TOKENS = 2048, 256


class HarnessModel:
    """A model whose weights are loaded, as lm-eval's `LM` asks it.

    Requests are objects whose `args` hold what is asked. `lm_eval_model` joins this class with lm-eval's.

    Args:
        candidate: The model.
        reader: Its tokenizer.
    """

    def __init__(self, candidate: Candidate, reader: TextReader) -> None:
        super().__init__()  # lm-eval's class, where there is one
        self._name = candidate.name
        self._positions = candidate.max_positions
        self._reader = reader
        self._settings = read_settings(reader.folder)
        self._stack = contextlib.ExitStack()
        self._engine = self._stack.enter_context(candidate.engine())
        self._last_only = gives_last_only(self._engine)

    @property
    def tokenizer_name(self) -> str:
        """Return the folder of the tokenizer, by which lm-eval names what it caches."""
        return str(self._reader.folder)

    def close(self) -> None:
        """End the processes of ranks; a model without ranks has none."""
        self._stack.close()

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of the second text of each request after the first.

        Args:
            requests: Objects with `args`, a pair of texts.
            disable_tqdm: Is ignored.
        """
        asked = [encode_continuation(self._reader, *request.args).within(self._positions) for request in requests]
        return [(item.log, item.is_greedy) for item in likelihoods(self._scorer(asked), asked)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in windows of the model's positions.

        Args:
            requests: Objects with `args`, whose first entry is a text.
            disable_tqdm: Is ignored.
        """
        found = []
        for request in requests:
            windows = self._rolling(request.args[0])
            found.append(sum(item.log for item in likelihoods(self._scorer(windows), windows)) if windows else 0.0)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what follows the text of each request, up to a text at which it shall stop.

        Args:
            requests: Objects with `args`, a text and options such as `until` and `max_gen_toks`.
            disable_tqdm: Is ignored.
        """
        return [self._continued(request.args[0], request.args[1]) for request in requests]

    def _scorer(self, asked: Sequence[Continuation]) -> Scorer:
        room = max((item.read for item in asked), default=1)
        return Scorer(self._engine, self._name, last_only=self._last_only, room=room)

    def _rolling(self, text: str) -> list[Continuation]:
        """Return windows that score each token of a text once, each with as much before it as fits."""
        begin = self._reader.begin or tuple(sorted(self._settings.eos)[:1]) or (0,)
        ids = np.array([*begin, *self._reader.tokenizer.encode_text(text)], np.int64)
        length = self._positions if self._positions is not None else _WINDOW
        found = []
        done = len(begin)
        while done < len(ids):
            stop = min(max(done - 1, 0) + length + 1, len(ids))
            start = max(0, stop - length - 1)
            found.append(Continuation(ids[start:done], ids[done:stop]))
            done = stop
        return found

    def _continued(self, context: str, options: Mapping[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        most = _NEW_TOKENS if self._positions is None else min(_NEW_TOKENS, self._positions // 2)
        new = int(options.get("max_gen_toks", most))
        temperature = float(options.get("temperature") or 0.0)
        sample = bool(options.get("do_sample", temperature > 0)) and temperature > 0
        sampling = Sampling(
            do_sample=sample,
            temperature=temperature or 1.0,
            top_k=int(options.get("top_k", 0)),
            top_p=float(options.get("top_p", 1.0)),
            seed=int(options.get("seed", 0)),
        )
        prompt = [*self._reader.begin, *self._reader.tokenizer.encode_text(context)] or [0]
        if self._positions is not None:
            new = min(new, self._positions - 1)
            prompt = prompt[-(self._positions - new) :]

        def stop(_: int, ids: Sequence[int]) -> bool:
            text = self._reader.tokenizer.decode(ids)
            return any(item in text for item in stops)

        found = generate(
            self._engine,
            [prompt],
            sampling,
            max_new_tokens=new,
            eos=self._settings.eos,
            pad=self._settings.pad,
            stop=stop,
        )
        text = self._reader.tokenizer.decode(found.rows[0].ids)
        return text[: min((text.index(item) for item in stops if item in text), default=len(text))]


def lm_eval_class() -> type[HarnessModel]:
    """Return `HarnessModel` as a class of lm-eval's models.

    Raises:
        UsageError: If lm-eval is not installed.
    """
    try:
        base = importlib.import_module("lm_eval.api.model").LM
    except ModuleNotFoundError as error:
        package = (error.name or "lm_eval").partition(".")[0]
        raise UsageError(f"needs {package}, which is not installed; pip install lm_eval") from error
    return type("PassoptLM", (HarnessModel, base), {})
