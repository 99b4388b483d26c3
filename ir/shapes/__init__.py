"""Hold what is known of shapes: lengths that are numbers or symbols, and integer vectors that hold lengths."""
