"""Evaluation: measures perplexity."""
