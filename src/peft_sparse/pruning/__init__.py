"""Pruning: chooses the entries of each weight to prune, and sets them to zero."""
