"""Change how numbers are stored and computed: cast models to 16 bits, and quantise weights and activations to int8."""
