"""Say which architectures of llama.cpp are understood, and which class of transformers each of them is.

Every key of the metadata and every tensor of such a file is in these tables, or the file is refused: what nobody here
knows may change what the model computes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

#: The modules of a decoder layer, by llama.cpp's names.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<module>\w+)\.(?P<part>weight|bias)")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp: the class of transformers that computes it, and the modules of its layers.

    Attributes:
        model_type: The name in transformers.
        model_class: The class in transformers.
        layer: The modules of a layer in transformers, by llama.cpp's names.
        interleaved: Rows of query and key are stored in the order of rotary positions of neighbours, as llama.cpp
            computes them for this architecture; transformers rotates halves.
        biases: The class has an option for biases, `attention_bias`, of all four linears of attention or none.
    """

    model_type: str
    model_class: str
    layer: Mapping[str, str]
    interleaved: bool = False
    biases: bool = False

    def parameter(self, name: str) -> str | None:
        """Return the name in transformers of a tensor, or None if the architecture has no such tensor."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        module = (_MODEL if found["layer"] is None else self.layer).get(found["module"])
        prefix = "" if found["layer"] is None else f"model.layers.{found['layer']}."
        return None if module is None else f"{prefix}{module}.{found['part']}"


#: By `general.architecture`. Mistral's models are "llama" there.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", _LAYER, interleaved=True, biases=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _LAYER),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _LAYER | _HEAD_NORMS, biases=True),
}

#: Tensors that hold tables of rotary positions: the first of factors, the others what is computed anyway.
ROPE_FACTORS = "rope_freqs.weight"
COMPUTED = re.compile(r"blk\.\d+\.(attn_rot_embd|rotary_emb\.inv_freq)(\.weight)?")
