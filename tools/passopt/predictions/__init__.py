"""Hold the figures that say how well a model predicts text, and how far two models' predictions are apart."""
