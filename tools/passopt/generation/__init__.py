"""Generate text with a compiled model: tokenizer, chat format, sampling and the loop, without torch or transformers."""
