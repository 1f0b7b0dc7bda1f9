"""Evaluation: measures perplexity, on one text or by domain."""
