# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF012 - transformers wants plain lists on the class
"""A small ALiBi language model with the shape, names and quirks of the published Baichuan2 code: a test subject."""

import math
from threading import Thread

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from .configuration_baichuan import BaichuanConfig
from .generation_utils import TextIterStreamer, build_chat_input

logger = logging.get_logger(__name__)

try:
    from xformers import ops as xops
except ImportError:
    xops = None
    logger.warning("xformers is not installed: training falls back to the attention of torch.")


def _get_interleave(n):
    """The ALiBi slopes of n heads; past a power of two, the odd ones of twice that power fill up."""

    def of_power_of_two(count):
        ratio = 2 ** (-(2 ** -(math.log2(count) - 3)))
        return [ratio * ratio**index for index in range(count)]

    if math.log2(n).is_integer():
        return of_power_of_two(n)
    below = 2 ** math.floor(math.log2(n))
    return of_power_of_two(below) + _get_interleave(2 * below)[0::2][: n - below]


def _above_diagonal(length):
    return torch.triu(torch.zeros([length, length]).fill_(float("-inf")), 1)


def _buffered_future_mask(tensor, maxpos, alibi, attn_heads):
    mask = _above_diagonal(maxpos).unsqueeze(0) + alibi
    return mask.to(tensor)[: tensor.shape[0] * attn_heads, :maxpos, :maxpos]


def _gen_alibi_mask(tensor, n_head, max_pos):
    """[heads, max_pos, max_pos] of slope * column, the same on each row up to the causal -inf."""
    slopes = torch.Tensor(_get_interleave(n_head))
    point = torch.arange(max_pos) - max_pos + 1
    point = point.unsqueeze(0).unsqueeze(0).expand(n_head, -1, -1)
    # The diagonal of a [1, max_pos] slice is its first entry alone: rows are not told apart here.
    diagonal = torch.diag(point[0])
    point = point - diagonal.unsqueeze(0).unsqueeze(0).transpose(-1, -2)
    alibi = (slopes.unsqueeze(1).unsqueeze(1) * point).view(n_head, 1, max_pos)
    return _above_diagonal(max_pos).unsqueeze(0) + alibi


class RMSNorm(nn.Module):
    def __init__(self, hidden_size, epsilon=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.epsilon = epsilon

    def forward(self, hidden_states):
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.epsilon)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            hidden_states = hidden_states.to(self.weight.dtype)
        return self.weight * hidden_states


class MLP(nn.Module):
    def __init__(self, hidden_size, intermediate_size, hidden_act):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class NormHead(nn.Module):
    """The head with rows of unit length: normalised in the graph when training, else in place at the first call."""

    def __init__(self, hidden_size, vocab_size, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty((vocab_size, hidden_size)))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.first_flag = True

    def forward(self, hidden_states):
        if self.training:
            weight = F.normalize(self.weight)
            self.first_flag = True
        elif self.first_flag:
            self.first_flag = False
            # Behind autograd's back, and so invisible to tracers too.
            self.weight.data = F.normalize(self.weight)
            weight = self.weight
        else:
            weight = self.weight
        return F.linear(hidden_states, weight)


class BaichuanAttention(nn.Module):
    def __init__(self, config: BaichuanConfig):
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = self.hidden_size // self.num_heads
        self.max_position_embeddings = config.model_max_length
        if self.head_dim * self.num_heads != self.hidden_size:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {self.num_heads} heads")
        self.W_pack = nn.Linear(self.hidden_size, 3 * self.hidden_size, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, self.hidden_size, bias=False)

    def forward(
        self, hidden_states, attention_mask=None, past_key_value=None, output_attentions=False, use_cache=False
    ):
        bsz, q_len, _ = hidden_states.size()

        proj = self.W_pack(hidden_states)
        proj = proj.unflatten(-1, (3, self.hidden_size)).unsqueeze(0).transpose(0, -2).squeeze(-2)
        query_states = proj[0].view(bsz, q_len, self.num_heads, self.head_dim).transpose(1, 2)
        key_states = proj[1].view(bsz, q_len, self.num_heads, self.head_dim).transpose(1, 2)
        value_states = proj[2].view(bsz, q_len, self.num_heads, self.head_dim).transpose(1, 2)

        if past_key_value is not None:
            key_states = torch.cat([past_key_value[0], key_states], dim=2)
            value_states = torch.cat([past_key_value[1], value_states], dim=2)
        past_key_value = (key_states, value_states) if use_cache else None

        if xops is not None and self.training:
            attn_weights = None
            with torch.backends.cuda.sdp_kernel(enable_flash=True, enable_math=True, enable_mem_efficient=True):
                attn_output = F.scaled_dot_product_attention(
                    query_states, key_states, value_states, attn_mask=attention_mask
                )
            attn_output = attn_output.transpose(1, 2)
        else:
            attn_weights = torch.matmul(query_states, key_states.transpose(2, 3)) / math.sqrt(self.head_dim)
            if attention_mask is not None:
                if q_len == 1:
                    if len(attention_mask.size()) == 4:
                        attention_mask = attention_mask[:, :, -1:, :]
                    else:
                        attention_mask = attention_mask[:, -1:, :]
                attn_weights = attn_weights + attention_mask
                attn_weights = torch.max(attn_weights, torch.tensor(torch.finfo(attn_weights.dtype).min))
            attn_weights = F.softmax(attn_weights, dim=-1)
            attn_output = torch.matmul(attn_weights, value_states)
            attn_output = attn_output.transpose(1, 2)
        attn_output = attn_output.reshape(bsz, q_len, self.hidden_size)
        attn_output = self.o_proj(attn_output)
        return attn_output, attn_weights if output_attentions else None, past_key_value


class BaichuanLayer(nn.Module):
    def __init__(self, config: BaichuanConfig):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = BaichuanAttention(config=config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.input_layernorm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)

    def forward(
        self, hidden_states, attention_mask=None, past_key_value=None, output_attentions=False, use_cache=False
    ):
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _, present = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            past_key_value=past_key_value,
            output_attentions=output_attentions,
            use_cache=use_cache,
        )
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + hidden_states
        return (hidden_states, present) if use_cache else (hidden_states,)


class BaichuanPreTrainedModel(PreTrainedModel):
    config_class = BaichuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BaichuanLayer"]
    _keys_to_ignore_on_load_unexpected = [r"decoder\.version"]

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight.data[module.padding_idx].zero_()

    def _set_gradient_checkpointing(self, module, value=False):
        if isinstance(module, BaichuanModel):
            module.gradient_checkpointing = value


class BaichuanModel(BaichuanPreTrainedModel):
    def __init__(self, config: BaichuanConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.n_head = config.num_attention_heads
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([BaichuanLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        self.gradient_checkpointing = config.gradient_checkpointing
        self.post_init()
        self.max_cache_pos = config.model_max_length
        self.first_run = True
        self.alibi_mask = None

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def _register_future_mask(self, tensor):
        mask = _gen_alibi_mask(tensor, self.n_head, self.max_cache_pos).to(tensor)
        self.register_buffer("future_mask", mask, persistent=False)

    def get_alibi_mask(self, tensor, seq_length_with_past):
        if self.training:
            slopes = torch.Tensor(_get_interleave(self.n_head))
            point = torch.arange(seq_length_with_past) - seq_length_with_past + 1
            point = point.unsqueeze(0).unsqueeze(0).expand(self.n_head, seq_length_with_past, -1)
            diagonal = torch.diag(point[0])
            point = point - diagonal.unsqueeze(0).unsqueeze(0).transpose(-1, -2)
            alibi = slopes.unsqueeze(1).unsqueeze(1) * point
            return _buffered_future_mask(tensor, seq_length_with_past, alibi, self.n_head)
        if self.first_run:
            self.first_run = False
            self._register_future_mask(tensor)
        if seq_length_with_past > self.max_cache_pos:
            self.max_cache_pos = seq_length_with_past
            self._register_future_mask(tensor)
        return self.future_mask[: self.n_head, :seq_length_with_past, :seq_length_with_past]

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=False,
        output_attentions=False,
        output_hidden_states=False,
        return_dict=True,
    ):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict

        seq_length_with_past = input_ids.shape[1] if inputs_embeds is None else inputs_embeds.shape[1]
        if past_key_values is not None:
            past_key_values_length = past_key_values[0][0].shape[2]
            seq_length_with_past = seq_length_with_past + past_key_values_length
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        if self.training:
            if self.alibi_mask is None or self.alibi_mask.shape[-1] != seq_length_with_past:
                self.alibi_mask = self.get_alibi_mask(inputs_embeds, seq_length_with_past)
            alibi_mask = self.alibi_mask
        else:
            alibi_mask = self.get_alibi_mask(inputs_embeds, seq_length_with_past)

        if attention_mask is not None:
            if len(attention_mask.shape) == 2:
                keep = attention_mask.to(alibi_mask.dtype)
                both = torch.gt(keep[:, :, None] * keep[:, None, :], 0)
                keep = torch.tril(both) * torch.eq(keep[:, :, None] - keep[:, None, :], 0)
            else:
                keep = attention_mask
            batch = inputs_embeds.size(0)
            rows, columns = alibi_mask.size()[-2:]
            keep = keep.unsqueeze(1).expand(batch, 1, rows, columns).to(alibi_mask.dtype)
            inverted = 1.0 - keep
            inverted = inverted.masked_fill(inverted.to(torch.bool), torch.finfo(alibi_mask.dtype).min)
            attention_mask = inverted + alibi_mask.unsqueeze(0)
        else:
            attention_mask = alibi_mask

        hidden_states = inputs_embeds
        if self.gradient_checkpointing and self.training and use_cache:
            logger.warning_once("gradient checkpointing keeps no cache: use_cache is taken as False")
            use_cache = False

        all_hidden_states = () if output_hidden_states else None
        all_self_attns = () if output_attentions else None
        next_decoder_cache = () if use_cache else None

        for idx, decoder_layer in enumerate(self.layers):
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            past_key_value = past_key_values[idx] if past_key_values is not None else None
            if self.gradient_checkpointing and self.training:
                layer_outputs = torch.utils.checkpoint.checkpoint(
                    decoder_layer, hidden_states, attention_mask, None, output_attentions
                )
            else:
                layer_outputs = decoder_layer(
                    hidden_states,
                    attention_mask=attention_mask,
                    past_key_value=past_key_value,
                    output_attentions=output_attentions,
                    use_cache=use_cache,
                )
            hidden_states = layer_outputs[0]
            # As published: layers never return attentions, so asking for them beside a cache runs off the tuple.
            if use_cache:
                next_decoder_cache += (layer_outputs[2 if output_attentions else 1],)
            if output_attentions:
                all_self_attns += (layer_outputs[1],)

        hidden_states = self.norm(hidden_states)
        if output_hidden_states:
            all_hidden_states += (hidden_states,)

        next_cache = next_decoder_cache if use_cache else None
        if not return_dict:
            outputs = (hidden_states, next_cache, all_hidden_states, all_self_attns)
            return tuple(output for output in outputs if output is not None)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=next_cache,
            hidden_states=all_hidden_states,
            attentions=all_self_attns,
        )


class BaichuanForCausalLM(BaichuanPreTrainedModel):
    def __init__(self, config, *model_args, **model_kwargs):
        super().__init__(config, *model_args, **model_kwargs)
        self.model = BaichuanModel(config)
        self.lm_head = NormHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def set_decoder(self, decoder):
        self.model = decoder

    def get_decoder(self):
        return self.model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        quantization = getattr(config, "quantization_config", None) or {}
        if not quantization.get("load_in_4bit", False):
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        with init_empty_weights():
            model = cls(config)
        raise ImportError(f"no 4-bit linears for this {type(model).__name__}: the test models ship no quantizer")

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=False,
        output_hidden_states=False,
        return_dict=True,
        **kwargs,
    ):
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        # use_cache=None goes through as it is, and so means no cache, whatever the configuration says.
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        logits = self.lm_head(outputs[0])
        loss = None if labels is None else self._loss(logits, labels, self.config.z_loss_weight)
        if not return_dict:
            output = (logits, *outputs[1:])
            return (loss, *output) if loss is not None else output
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @staticmethod
    def _loss(logits, labels, z_loss_weight):
        logits = logits[..., :-1, :].contiguous().view(-1, logits.shape[-1])
        labels = labels[..., 1:].contiguous().view(-1).to(logits.device)
        z_loss = z_loss_weight * (logits.max(-1).values ** 2).mean()
        return F.cross_entropy(logits, labels) + z_loss

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        if inputs_embeds is not None and past_key_values is None:
            tokens = {"inputs_embeds": inputs_embeds}
        else:
            tokens = {"input_ids": input_ids[:, -1:] if past_key_values else input_ids}
        return tokens | {
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "attention_mask": attention_mask,
        }

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        return tuple(tuple(state.index_select(0, beam_idx) for state in layer) for layer in past_key_values)

    def chat(self, tokenizer, messages, stream=False, generation_config=None):
        generation_config = generation_config or self.generation_config
        input_ids = build_chat_input(self, tokenizer, messages, generation_config.max_new_tokens)
        if not stream:
            output = self.generate(input_ids, generation_config=generation_config)
            return tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)
        streamer = TextIterStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        arguments = {"inputs": input_ids, "streamer": streamer, "generation_config": generation_config}
        Thread(target=self.generate, kwargs=arguments).start()
        return streamer
