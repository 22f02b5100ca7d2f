"""Evaluation with the lm-evaluation-harness. Imports nothing: torch passes through here on its way to `plugin`."""
