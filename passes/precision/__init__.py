"""Passes that change how numbers are stored: casts to 16 bits, int8 weights, int8 activations."""
