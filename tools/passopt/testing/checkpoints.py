"""Make tiny checkpoints that are laid out like the published Baichuan2 ones, and are as awkward to export.

`make_checkpoint` writes a directory in well under a second and without torch (except for ``format="bin"``). The trained
weights predict English; `evaluation_text` was held out from training, so that perplexities can be compared.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Tensors = Mapping[str, npt.NDArray[np.generic]]

Dtype = Literal["bf16", "fp16", "fp32"]
Format = Literal["safetensors", "bin"]

DATA = Path(__file__).parent / "data"
REMOTE_CODE = Path(__file__).parent / "remote_code"

# The token ids that stand for a role in a chat; <unk>, <s> and </s> are 0, 1 and 2.
USER_TOKEN_ID = 3
ASSISTANT_TOKEN_ID = 4

_TORCH_DTYPES: Mapping[Dtype, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_FILE_STEMS: Mapping[Format, str] = {"safetensors": "model", "bin": "pytorch_model"}


@dataclasses.dataclass(frozen=True)
class CheckpointSpec:
    """The shape of a model: ``rotary`` is the code of the 7B, ``alibi`` that of the 13B.

    Attributes:
        family: "rotary" or "alibi".
        heads: Attention heads.
        hidden: The width of the hidden state, over all heads.
        intermediate: The width of the MLP.
        layers: Decoder layers.
        vocab: Rows of the embedding and of the head.
        max_positions: The longest sequence that the configuration states.

    Raises:
        ValueError: If `hidden` does not split into the heads, or a rotary head not into halves.
    """

    family: Literal["rotary", "alibi"]
    heads: int
    hidden: int
    intermediate: int
    layers: int
    vocab: int
    max_positions: int

    def __post_init__(self) -> None:
        parts = self.heads * (2 if self.family == "rotary" else 1)
        if self.hidden % parts:
            halves = " with two halves each" if self.family == "rotary" else ""
            raise ValueError(f"hidden {self.hidden} does not split into {self.heads} heads{halves}")

    @property
    def head_dim(self) -> int:
        """Return the size of a head."""
        return self.hidden // self.heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor by name, in the order of the published checkpoints."""
        hidden, wide = self.hidden, self.intermediate
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, hidden)}
        for layer in range(self.layers):
            for name, shape in (
                ("self_attn.W_pack", (3 * hidden, hidden)),
                ("self_attn.o_proj", (hidden, hidden)),
                ("mlp.gate_proj", (wide, hidden)),
                ("mlp.up_proj", (wide, hidden)),
                ("mlp.down_proj", (hidden, wide)),
                ("input_layernorm", (hidden,)),
                ("post_attention_layernorm", (hidden,)),
            ):
                shapes[f"model.layers.{layer}.{name}.weight"] = shape
        return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (self.vocab, hidden)}


# No two dimensions of a spec are equal, so that a mixed-up axis cannot go unnoticed.
#: A tiny model with the code of the 7B: rotary embedding, three layers. It comes trained.
ROTARY = CheckpointSpec("rotary", heads=4, hidden=64, intermediate=168, layers=3, vocab=520, max_positions=128)
#: A tiny model with the code of the 13B: ALiBi, two layers. It comes trained.
ALIBI = CheckpointSpec("alibi", heads=6, hidden=72, intermediate=180, layers=2, vocab=516, max_positions=96)
# Five heads can be split evenly only by five, and 505 = 5 * 101 rows of vocabulary only by five and 101. So other
# degrees need padding.
ODD = CheckpointSpec("alibi", heads=5, hidden=40, intermediate=100, layers=2, vocab=505, max_positions=56)

_TRAINED: Mapping[CheckpointSpec, str] = {ROTARY: "rotary.safetensors", ALIBI: "alibi.safetensors"}


def full_size_spec(model: Literal["7b", "13b"]) -> CheckpointSpec:
    """Return the true sizes of a Baichuan2 model, meant for ``make_checkpoint(..., weights=False)``."""
    if model == "7b":
        return CheckpointSpec("rotary", 32, 4096, 11008, 32, 125696, 4096)
    return CheckpointSpec("alibi", 40, 5120, 13696, 40, 125696, 4096)


def make_checkpoint(
    directory: Path | str,
    spec: CheckpointSpec = ROTARY,
    *,
    trained: bool = True,
    dtype: Dtype = "bf16",
    format: Format = "safetensors",
    shards: int = 1,
    seed: int = 0,
    weights: bool = True,
) -> Path:
    """Write a checkpoint directory: configuration, remote code, tokenizer and, unless told not to, weights.

    Args:
        directory: The directory to write; it may exist if it is empty.
        spec: The sizes of the model.
        trained: Use trained weights, which only `ROTARY` and `ALIBI` have; otherwise weights are random.
        dtype: The number type of the weights.
        format: The format of the weight files.
        shards: The number of weight files; with more than one, an index that maps tensors to files is written too.
        seed: The seed of random weights.
        weights: Write weights at all.

    Returns:
        The directory.

    Raises:
        FileExistsError: If `directory` is not empty.
        ValueError: If the arguments do not fit together.
    """
    if dtype not in _TORCH_DTYPES:
        raise ValueError(f"dtype is one of {', '.join(_TORCH_DTYPES)}, not {dtype!r}")
    if format not in _FILE_STEMS:
        raise ValueError(f"format is one of {', '.join(_FILE_STEMS)}, not {format!r}")
    if not 1 <= shards <= len(spec.shapes()):
        raise ValueError(f"{len(spec.shapes())} tensors do not fill {shards} shards")
    if weights and trained and spec not in _TRAINED:
        raise ValueError(f"no trained weights for {spec}: pass trained=False, or use ROTARY or ALIBI")

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty: a checkpoint is only written to a new directory")

    _write_configuration(directory, spec, dtype)
    code = [file for part in ("common", spec.family) for file in sorted((REMOTE_CODE / part).glob("*.py"))]
    for source in [*code, DATA / "tokenizer.model"]:
        shutil.copyfile(source, directory / source.name)
    if weights:
        tensors = read_safetensors(DATA / _TRAINED[spec]) if trained else random_weights(spec, seed)
        ordered = {name: tensors[name] for name in spec.shapes()}
        _write_weights(directory, cast(ordered, dtype), format, shards)
    return directory


def random_weights(spec: CheckpointSpec, seed: int = 0) -> Tensors:
    """Return random weights in float32 under which activations keep their size.

    All scales of norms and the lengths of all rows of the head are different.
    """
    import numpy as np

    random = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
        if len(shape) == 1:
            return random.uniform(0.6, 1.4, shape).astype(np.float32)
        scale: float | npt.NDArray[np.float64] = shape[-1] ** -0.5
        if name == "model.embed_tokens.weight":
            scale = 0.5
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            scale *= (2 * spec.layers) ** -0.5
        elif name == "lm_head.weight":
            # Rows have different lengths, so that a head that lost its normalisation shows in the logits.
            scale = scale * random.uniform(0.4, 2.5, (shape[0], 1))
        return (random.standard_normal(shape) * scale).astype(np.float32)

    return {name: draw(name, shape) for name, shape in spec.shapes().items()}


def read_safetensors(path: Path) -> Tensors:
    """Return all tensors of a file, bfloat16 ones too, which safetensors.numpy can write but not read."""
    import ml_dtypes
    import numpy as np

    dtypes = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)

    def read(dtype: str, shape: list[int], data_offsets: list[int]) -> npt.NDArray[np.generic]:
        begin, end = data_offsets
        return np.frombuffer(content[start + begin : start + end], dtypes[dtype]).reshape(shape)

    return {name: read(**entry) for name, entry in header.items()}


def safetensors_bytes(tensors: Tensors) -> bytes:
    """Return the tensors as the bytes of a safetensors file that says it is from torch, as loaders demand."""
    from safetensors.numpy import save

    return save(dict(tensors), metadata={"format": "pt"})


def cast(tensors: Tensors, dtype: Dtype) -> Tensors:
    """Return the tensors rounded to `dtype`."""
    import ml_dtypes
    import numpy as np

    target = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}[dtype]
    return {name: np.ascontiguousarray(array, target) for name, array in tensors.items()}


def training_text() -> str:
    """Return the text that trained the checkpoints and their tokenizer.

    It is about seven eighths of Python's language reference, as the standard library carries it.
    """
    return _texts()[0]


def evaluation_text() -> str:
    """Return the held-out eighth of the text.

    It differs a little between versions of Python, so compare perplexities on one version only.
    """
    return _texts()[1]


@functools.cache
def _texts() -> tuple[str, str]:
    from pydoc_data.topics import topics

    # The hash of a paragraph alone decides on which side it is, so no version of Python evaluates a training paragraph.
    paragraphs = dict.fromkeys(part for topic in sorted(topics) for part in topics[topic].split("\n\n"))
    held_out = {part for part in paragraphs if zlib.crc32(part.encode()) % 8 == 0}
    training = [part for part in paragraphs if part not in held_out]
    evaluation = [part for part in paragraphs if part in held_out]
    return "\n\n".join(training), "\n\n".join(evaluation)


def _write_configuration(directory: Path, spec: CheckpointSpec, dtype: Dtype) -> None:
    special_ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config: dict[str, Any] = {
        "architectures": ["BaichuanForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_baichuan.BaichuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
        },
        "tokenizer_class": "BaichuanTokenizer",
        "model_type": "baichuan",
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "hidden_act": "silu",
        "model_max_length": spec.max_positions,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": _TORCH_DTYPES[dtype],
        "transformers_version": "4.29.2",
        **special_ids,
    }
    if spec.family == "rotary":
        config["max_position_embeddings"] = spec.max_positions
    else:
        config["gradient_checkpointing"] = False

    texts = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": True}
    special = {role: {"content": text, **flags} for role, text in texts.items()}
    tokenizer_config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
        "clean_up_tokenization_spaces": False,
        "model_max_length": spec.max_positions,
        "sp_model_kwargs": {},
        "tokenizer_class": "BaichuanTokenizer",
        **{role: {"__type": "AddedToken", **token} for role, token in special.items()},
    }
    generation_config = {
        **special_ids,
        "user_token_id": USER_TOKEN_ID,
        "assistant_token_id": ASSISTANT_TOKEN_ID,
        "max_new_tokens": spec.max_positions // 2,
        "temperature": 0.3,
        "top_k": 5,
        "top_p": 0.85,
        "repetition_penalty": 1.05,
        "do_sample": True,
        "transformers_version": "4.29.2",
    }
    _write_json(directory / "config.json", config)
    _write_json(directory / "tokenizer_config.json", tokenizer_config)
    _write_json(directory / "special_tokens_map.json", special)
    _write_json(directory / "generation_config.json", generation_config)


def _write_weights(directory: Path, tensors: Tensors, format: Format, shards: int) -> None:
    stem, names = _FILE_STEMS[format], list(tensors)
    if shards == 1:
        _write_tensors(directory / f"{stem}.{format}", tensors, names)
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.{format}"
        _write_tensors(directory / file, tensors, part)
        weight_map |= dict.fromkeys(part, file)
    total_size = sum(array.nbytes for array in tensors.values())
    _write_json(
        directory / f"{stem}.{format}.index.json",
        {"metadata": {"total_size": total_size}, "weight_map": weight_map},
    )


def _write_tensors(path: Path, tensors: Tensors, names: Sequence[str]) -> None:
    if path.suffix == ".safetensors":
        path.write_bytes(safetensors_bytes({name: tensors[name] for name in names}))
        return

    import numpy as np
    import torch

    def as_torch(array: npt.NDArray[np.generic]) -> torch.Tensor:
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())

    torch.save({name: as_torch(tensors[name]) for name in names}, path)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
