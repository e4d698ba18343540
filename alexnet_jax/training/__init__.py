"""A training run: the loop, its step, its checkpoints and its logs."""
