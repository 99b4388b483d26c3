"""Write a Q8_0 GGUF of a shape for llama.cpp, or measure its speed, in an environment of its own.

    python tools/bench/compiled/with_llama_cpp.py write JOB.json | measure JOB.json

Rotary shapes are written as llama.cpp's model `llama`, and ALiBi shapes as `refact`, which has the same layer with
ALiBi in the place of rotation. `baichuan` itself uses ALiBi only if there are 40 layers.
"""

from __future__ import annotations

import ctypes
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

# A program finds only the modules beside it, but the modules of the benchmarks import each other from tools/bench.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compiled.shapes import HEAD_DIM, Array, Memory, Shape, draw, draw_layer, evict, timed, tokens

CONTEXT = 2560
_NAMES = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def write(path: Path, shape: Shape) -> None:
    """Write the GGUF of a shape, with every matrix in Q8_0, norms in fp32, and a vocabulary of numbered tokens."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama" if shape.family == "rotary" else "refact", use_temp_file=False)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{index}>" for index in range(shape.vocabulary)])
    writer.add_token_scores([0.0] * shape.vocabulary)
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * shape.vocabulary)
    matrices = {"token_embd": ("embed", shape.vocabulary), "output": ("head", shape.vocabulary)}
    plan: list[tuple[str, Any]] = [(key, (name, rows)) for key, (name, rows) in matrices.items()]
    for name, (_, rows) in plan:
        _add_info(writer, name, (rows, shape.hidden))
    for layer in range(shape.layers):
        for name, sizes in shape.linears().items():
            _add_info(writer, f"blk.{layer}.{_NAMES[name]}", sizes)
    norms = ["output_norm"] + [
        f"blk.{layer}.{name}" for layer in range(shape.layers) for name in ("attn_norm", "ffn_norm")
    ]
    for name in norms:
        writer.add_tensor_info(f"{name}.weight", (shape.hidden,), np.dtype(np.float32), 4 * shape.hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, (name, rows) in plan:
        writer.write_tensor_data(_q8(draw(name, (rows, shape.hidden))))
    for layer in range(shape.layers):
        for name, weight in draw_layer(shape, layer):
            rotated = shape.family == "rotary" and name in "qk"
            writer.write_tensor_data(_q8(_paired(weight, shape.heads) if rotated else weight))
    for name in norms:
        writer.write_tensor_data(draw(name, (shape.hidden,)))
    writer.close()


def _add_info(writer: Any, name: str, sizes: tuple[int, int]) -> None:
    import gguf

    rows, columns = sizes
    raw = gguf.GGMLQuantizationType.Q8_0
    byte_shape = gguf.quant_shape_to_byte_shape((rows, columns), raw)
    writer.add_tensor_info(f"{name}.weight", byte_shape, np.dtype(np.uint8), rows * columns // 32 * 34, raw_dtype=raw)


def _q8(weight: Array) -> Array:
    """Return a weight as bytes of Q8_0, which are an fp16 scale and int8 codes for every 32 weights of a row."""
    rows, columns = weight.shape
    blocks = weight.reshape(-1, 32)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    codes = np.rint(blocks / np.maximum(scales, np.float32(1e-30))).astype(np.int8)
    packed = np.concatenate([scales.astype(np.float16).view(np.uint8), codes.view(np.uint8)], axis=1)
    return packed.reshape(rows, columns // 32 * 34)


def _paired(weight: Array, heads: int) -> Array:
    """Return the rows of each head in the order of `llama`, which rotates neighbouring rows instead of halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, HEAD_DIM // 2, columns).swapaxes(1, 2).reshape(rows, columns)


class Llama:
    """Run tokens through a model in a context of llama.cpp."""

    def __init__(self, path: Path, shape: Shape, threads: int, *, flash: bool, batch: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        loading = llama_cpp.llama_model_default_params()
        if "load_mode" not in (name for name, *_ in loading._fields_):
            raise SystemExit("llama-cpp-python has no load_mode: its weights would stay in the page cache")
        loading.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), loading)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = CONTEXT
        options.n_batch = CONTEXT
        options.n_ubatch = batch
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context for {path}")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        # The last layer computes only rows whose logits are asked for. With a single layer, that would be almost none.
        self.every_row = not shape.is_whole

    def threads(self, count: int) -> None:
        """Set the number of threads."""
        self.api.llama_set_n_threads(self.context, count, count)

    def clear(self, keep: int = 0) -> None:
        """Remove all but the first `keep` tokens from the cache."""
        if keep:
            self.api.llama_memory_seq_rm(self.memory, 0, keep, -1)
        else:
            self.api.llama_memory_clear(self.memory, False)

    def start(self) -> None:
        """Empty the KV cache and the CPU caches, before a prefill is measured."""
        self.clear()
        evict()

    def feed(self, ids: Array) -> None:
        """Run all `ids` in one call, after what the cache holds; compute logits of the last one, or of `every_row`."""
        past = int(self.api.llama_memory_seq_pos_max(self.memory, 0)) + 1
        batch = self.api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = int(token), past + index, 1
            batch.seq_id[index][0], batch.logits[index] = 0, self.every_row or index == len(ids) - 1
        status = self.api.llama_decode(self.context, batch)
        self.api.llama_synchronize(self.context)
        self.api.llama_batch_free(batch)
        if status:
            raise SystemExit(f"llama_decode: status {status}")

    def logits(self) -> Array:
        """Return the logits of the last token."""
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, -1), shape=(self.vocabulary,)).copy()


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of all points, the logits after the first prompt to compare, and the memory held."""
    memory, shape = Memory(), Shape(**job["shape"])
    llama = Llama(Path(job["model"]), shape, job["threads"][0], flash=job["flash"], batch=job.get("batch", 512))
    results: dict[str, Any] = {}
    for threads in job["threads"]:
        llama.threads(threads)
        for count in job["prefill"]:
            run = partial(llama.feed, tokens(count, llama.vocabulary))
            results[f"prefill {count} {threads}"] = timed(run, seconds=job["seconds"], prepare=llama.start)
            results.setdefault("logits", llama.logits().tolist())
    llama.clear()
    held = 0
    for past in sorted(job["decode"]):
        llama.threads(max(job["threads"]))
        llama.feed(tokens(past, llama.vocabulary)[held:])
        held = past
        for threads in job["threads"]:
            llama.threads(threads)
            run = partial(llama.feed, tokens(1, llama.vocabulary))
            times = timed(run, seconds=job["seconds"], prepare=partial(llama.clear, past))
            results[f"decode {past} {threads}"] = times
        llama.clear(past)
    caches = 2 * 2 * shape.width * CONTEXT * shape.layers  # keys and values in fp16
    return results | {"memory": memory.held(caches)}


def main(task: str, file: str) -> None:
    """Write or measure as the job in `file` says, and print the results as JSON."""
    job = json.loads(Path(file).read_text())
    if task == "write":
        write(Path(job["model"]), Shape(**job["shape"]))
        print("{}")
    else:
        print(json.dumps(measure(job)))


if __name__ == "__main__":
    main(*sys.argv[1:3])
