"""Run a model on calibration data, and find the codes, scales and vectors that keep its answers."""
