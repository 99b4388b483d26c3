"""Evaluate models on texts and questions: perplexity, divergence from a reference, and accuracy of choices."""
