# SPDX-License-Identifier: Apache-2.0
"""Chat prompts and token streaming for the small test models."""

from queue import Queue

import torch


def build_chat_input(model, tokenizer, messages, max_new_tokens=0):
    """Token ids [1, length] of a conversation: each turn behind its role's token, oldest rounds dropped first."""
    config = model.generation_config
    role_ids = {"user": config.user_token_id, "assistant": config.assistant_token_id}
    room = model.config.model_max_length - (max_new_tokens or config.max_new_tokens)

    has_system = bool(messages) and messages[0]["role"] == "system"
    system = tokenizer.encode(messages[0]["content"]) if has_system else []
    rounds = []
    for message in messages[has_system:]:
        if message["role"] not in role_ids:
            raise ValueError(f"a chat turn is by 'user' or 'assistant', not {message['role']!r}")
        if message["role"] == "user" or not rounds:
            rounds.append([])
        rounds[-1] += [role_ids[message["role"]], *tokenizer.encode(message["content"])]

    history = []
    for turns in reversed(rounds):
        if history and len(history) + len(turns) > room - len(system):
            break
        history = turns + history

    prompt = system + history
    if messages[-1]["role"] != "assistant":
        prompt.append(role_ids["assistant"])
    return torch.tensor([prompt[-room:]], dtype=torch.long, device=model.device)


class TextIterStreamer:
    """An iterator over the answer so far, decoded anew after each token; `generate` feeds it from a thread."""

    def __init__(self, tokenizer, skip_prompt=False, skip_special_tokens=False):
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.skip_special_tokens = skip_special_tokens
        self.tokens = []
        self.texts = Queue()
        self.at_prompt = True

    def put(self, value):
        is_prompt, self.at_prompt = self.at_prompt, False
        if is_prompt and self.skip_prompt:
            return
        self.tokens += value.reshape(-1, value.shape[-1])[0].tolist() if value.ndim else [value.item()]
        self.texts.put(self.tokenizer.decode(self.tokens, skip_special_tokens=self.skip_special_tokens))

    def end(self):
        self.texts.put(None)

    def __iter__(self):
        return iter(self.texts.get, None)
