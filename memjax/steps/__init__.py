"""How one training step runs; one file a kind of step."""
