"""Read checkpoints that were quantised elsewhere: their settings, and their codes and scales as lazy weights."""
