"""Run one candidate on the prompts and on the text, in a process of its own, and print what it found as JSON.

    python tools/bench/real/candidates.py transformers GGUF REFERENCE
    python tools/bench/real/candidates.py onnx|compiled FOLDER REFERENCE

`transformers` reads the GGUF file by code of its own, and writes its tokens and logits to REFERENCE; others are
compared with these.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from real.inputs import NEW_TOKENS, QUESTIONS, TEXTS, WINDOW, WINDOWS, text

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

TOKENS, LOGITS = "tokens.json", "logits.npy"


def transformers_reference(gguf: Path, folder: Path) -> dict[str, Any]:
    """Generate greedily with transformers, and write tokens and logits to `folder`."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    prompts = [
        *(
            tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)[
                "input_ids"
            ]
            for question in QUESTIONS
        ),
        *(tokenizer(start)["input_ids"] for start in TEXTS),
    ]
    ids = tokenizer(text(), add_special_tokens=False)["input_ids"][: WINDOWS * WINDOW]
    folder.mkdir()
    logits = np.lib.format.open_memmap(folder / LOGITS, "w+", np.float32, (WINDOWS, WINDOW, model.config.vocab_size))
    with torch.no_grad():
        new = _greedy(model, prompts)
        for index, window in enumerate(windows(ids)):
            logits[index] = model(torch.from_numpy(window[None])).logits[0].numpy()
    end = tokenizer.eos_token_id
    tokens = {"prompts": prompts, "new": [row[: row.index(end)] if end in row else row for row in new], "text": ids}
    (folder / TOKENS).write_text(json.dumps(tokens))
    return compared(lambda: iter(logits), logits, ids)


def _greedy(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the new tokens of all prompts, which run in one batch with padding on the left."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    return found[:, longest:].tolist()


def onnx_candidate(folder: Path, reference: Path) -> dict[str, Any]:
    """Compare the logits of an output folder, in onnxruntime, with the reference."""
    from passopt.generation.tokenizer import load_tokenizer
    from passopt.ir.graph.decoder import LOGITS as OUTPUT
    from passopt.targets.onnxruntime.joined_ranks import load_any
    from passopt.targets.onnxruntime.session import Session
    from passopt.verification.sampling.cache_inputs import cache_inputs
    from passopt.verification.scenarios import Step
    from passopt.verification.verify import runnable

    expected, logits = _reference(reference)
    _check_tokens(load_tokenizer(folder), expected)
    model = runnable(load_any(folder), "candidate", [])
    session, caches = Session(model, threads=os.cpu_count() or 1), cache_inputs(model)
    empty = {name: array for cache in caches for name, array in cache.empty(1).items()}

    def run() -> Iterator[Array]:
        for window in windows(expected["text"]):
            ids = window[None]
            step = Step(ids, np.ones_like(ids), np.arange(WINDOW)[None])
            yield session.run({**step.feeds(), **empty})[OUTPUT][0]

    return compared(run, logits, expected["text"])


def compiled_candidate(folder: Path, reference: Path) -> dict[str, Any]:
    """Compare the logits and the greedy tokens of a compiled folder with the reference."""
    import passopt

    expected, logits = _reference(reference)
    with passopt.Engine.load(folder) as engine:
        _check_tokens(engine.tokenizer, expected)
        prompts: list[Any] = [[{"role": "user", "content": question}] for question in QUESTIONS] + list(TEXTS)
        result = engine.generate(prompts, max_new_tokens=NEW_TOKENS, greedy=True)

        def run() -> Iterator[Array]:
            for window in windows(expected["text"]):
                engine.allocate(1, WINDOW)
                yield engine.forward(window[None], np.ones((1, WINDOW), np.int64))[0]

        found = compared(run, logits, expected["text"])
    if [list(prompt) for prompt in result.prompts] != expected["prompts"]:
        raise SystemExit("the prompts are other tokens than those of transformers")
    return found | _tokens_compared([list(row.ids) for row in result.generation.rows], expected["new"])


def _reference(folder: Path) -> tuple[dict[str, Any], Array]:
    return json.loads((folder / TOKENS).read_text()), np.load(folder / LOGITS, mmap_mode="r")


def _check_tokens(tokenizer: Any, expected: dict[str, Any]) -> None:
    if tokenizer.encode_text(text())[: WINDOWS * WINDOW] != expected["text"]:
        raise SystemExit("the text is other tokens than those of transformers")


def windows(ids: Sequence[int]) -> Iterator[Array]:
    """Yield the windows of the text."""
    yield from np.array(ids, np.int64).reshape(WINDOWS, WINDOW)


def _tokens_compared(found: list[list[int]], expected: list[list[int]]) -> dict[str, Any]:
    """Count the prompts with equal new tokens, and the tokens before the first that differs."""
    same = [_common(one, other) for one, other in zip(found, expected, strict=True)]
    return {
        "equal": sum(one == other for one, other in zip(found, expected, strict=True)),
        "prompts": len(expected),
        "equal tokens": sum(same),
        "tokens": sum(len(row) for row in expected),
    }


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def compared(run: Callable[[], Iterator[Array]], reference: Array, ids: Sequence[int]) -> dict[str, Any]:
    """Return the perplexity, and per position the KL divergence from the reference and the agreement of the first.

    Args:
        run: A function that yields the logits of each window, [positions, vocabulary].
        reference: The logits of the reference, [windows, positions, vocabulary].
        ids: The tokens of all windows.
    """
    from passopt.predictions.divergence import divergence
    from passopt.verification.scenarios import Step, surprise

    surprises = []

    def pairs() -> Iterator[tuple[Array, Array]]:
        for found, expected, window in zip(run(), reference, windows(ids), strict=True):
            step = Step(window[None], np.ones((1, WINDOW), np.int64), np.arange(WINDOW)[None])
            surprises.append(surprise(found[None], step, WINDOW - 1) or 0.0)
            yield expected, found

    judged = divergence(pairs())
    return {
        "perplexity": float(np.exp(sum(surprises) / (WINDOWS * (WINDOW - 1)))),
        "kl": max(0.0, judged.mean),
        "kl99": max(0.0, judged.high),
        "top1": judged.top1,
    }


RUN = {"transformers": transformers_reference, "onnx": onnx_candidate, "compiled": compiled_candidate}


if __name__ == "__main__":
    print(json.dumps(RUN[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))))
