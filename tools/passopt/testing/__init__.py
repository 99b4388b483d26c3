"""For authors of passes: `check_pass` (a pytest fixture, see `plugin`), golden texts, tiny checkpoints to export."""
