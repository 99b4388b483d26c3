"""Convert a model to another opset, operator by operator, and refuse what cannot be proven."""
