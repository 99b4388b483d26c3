"""Train the tokenizer and the weights that `passopt.testing.make_checkpoint` ships, and write them in place.

    python tools/dev/train_checkpoints.py [--out DIR] [--steps N]

Training is seeded and takes a few minutes on two threads. It runs in float32 through the remote code itself, so that
the weights fit what that code computes. They are stored in bfloat16, as those of published checkpoints are.
Perplexities are printed.
"""

from __future__ import annotations

import argparse
import copy
import io
import math
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch

from passopt.testing import checkpoints
from passopt.testing.checkpoints import ALIBI, ROTARY, CheckpointSpec

#: Pieces of the tokenizer's vocabulary.
PIECES = 500
BATCH = 24
LEARNING_RATE = 4e-3


def train_tokenizer() -> bytes:
    """Train a byte-pair tokenizer with byte fallback, and return its serialised model.

    Its pieces 3 and 4 stand for the roles of a chat.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in checkpoints.training_text().splitlines() if line.strip()),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        character_coverage=0.9995,
        user_defined_symbols="<reserved_106>,<reserved_107>",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def load(directory: Path) -> Any:
    """Load the model of a checkpoint directory in float32, through its own remote code."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    model_class: Any = get_class_from_dynamic_module("modeling_baichuan.BaichuanForCausalLM", str(directory))
    model = model_class(model_class.config_class.from_pretrained(str(directory)))
    tensors = checkpoints.cast(checkpoints.read_safetensors(directory / "model.safetensors"), "fp32")
    model.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()})
    return model


def perplexity(model: Any, tokens: torch.Tensor, length: int) -> float:
    """Return the perplexity per token, over windows of `length` tokens.

    This works on a copy of the model, because in evaluation its head would normalise its own weight for good.
    """
    model = copy.deepcopy(model).eval()
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    with torch.no_grad():
        parts = [windows[start : start + 16] for start in range(0, len(windows), 16)]
        losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in parts]
    return math.exp(sum(losses) / len(windows))


def train(model: Any, tokens: torch.Tensor, length: int, steps: int) -> None:
    """Train the model in place for `steps` batches of random windows of `length` tokens, and print the loss."""
    generator = torch.Generator().manual_seed(0)
    # The configuration holds a 1-tuple here, which is always true. Checkpointing would only cost time.
    model.model.gradient_checkpointing = False
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(steps):
        starts = torch.randint(0, len(tokens) - length, (BATCH, 1), generator=generator)
        batch = tokens[starts + torch.arange(length)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"  step {step:5d}  loss {loss.item():.3f}  {time.monotonic() - started:4.0f} s", flush=True)


def train_family(spec: CheckpointSpec, out: Path, steps: int, work: Path) -> None:
    """Train one family, write its weights to `out`, and print perplexities before and after; `work` is scratch."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=(out / "tokenizer.model").read_bytes())
    training, evaluation = (
        torch.tensor(tokenizer.encode(text)) for text in (checkpoints.training_text(), checkpoints.evaluation_text())
    )
    print(f"{spec}\n  {len(training)} tokens to train, {len(evaluation)} held out")
    source = checkpoints.make_checkpoint(work / spec.family, spec, trained=False, dtype="fp32")
    model = load(source)
    untrained = perplexity(model, evaluation, spec.max_positions)
    train(model, training, spec.max_positions, steps)

    arrays = {name: model.state_dict()[name].numpy() for name in spec.shapes()}
    path = out / f"{spec.family}.safetensors"
    path.write_bytes(checkpoints.safetensors_bytes(checkpoints.cast(arrays, "bf16")))
    stored = checkpoints.cast(checkpoints.read_safetensors(path), "fp32")
    model.load_state_dict({name: torch.tensor(array) for name, array in stored.items()})
    trained = perplexity(model, evaluation, spec.max_positions)
    rows = np.linalg.norm(arrays["lm_head.weight"], axis=1)
    print(f"  perplexity: uniform {spec.vocab}, untrained {untrained:.1f}, trained and stored {trained:.2f}")
    print(f"  head rows are {rows.min():.2f} to {rows.max():.2f} long; {path.name} has {path.stat().st_size} bytes")


def main() -> None:
    """Train the tokenizer and both families, and write them to the folder asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=checkpoints.DATA, help="folder to write to (%(default)s)")
    parser.add_argument("--steps", type=int, default=1200, help="steps of training for each family (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore", message=".*sdp_kernel.*", category=FutureWarning)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "tokenizer.model").write_bytes(train_tokenizer())
    with tempfile.TemporaryDirectory() as work:
        os.environ["HF_MODULES_CACHE"] = f"{work}/modules"
        for spec in (ROTARY, ALIBI):
            train_family(spec, arguments.out, arguments.steps, Path(work))


if __name__ == "__main__":
    main()
