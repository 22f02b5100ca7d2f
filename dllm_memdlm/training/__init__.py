"""Training: the trainer and its data's order, engines, checkpoints, runs."""
