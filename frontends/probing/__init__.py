"""Look at a model's own code before it is traced: run it without data, and find where it depends on lengths."""
