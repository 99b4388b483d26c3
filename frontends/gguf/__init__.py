"""Read GGUF files, llama.cpp's format, and write what they hold as a Hugging Face checkpoint that export can open.

The package `gguf` reads the format and dequantises. This one says what metadata and tensors mean: configuration, rotary
positions, the order of rows, tokenizer and chat template. What it does not know it refuses by name.
"""
