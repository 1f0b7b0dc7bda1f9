"""What a model is: its weights as matrices, their masks, its blocks, and the processes that hold it."""
