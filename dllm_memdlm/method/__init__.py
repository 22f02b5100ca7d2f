"""The method of the paper, and nothing else."""
