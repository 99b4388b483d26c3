"""Measure what the passes do to a trained model: tokens, KL divergence and perplexity against transformers."""
