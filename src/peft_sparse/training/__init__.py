"""`SparseTrainer`, its arguments and its callbacks."""
