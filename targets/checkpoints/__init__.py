"""Write quantised checkpoints in the formats of other tools: compressed-tensors and GPTQ."""
