"""Measure what each way of quantising costs a trained model, and draw it."""
