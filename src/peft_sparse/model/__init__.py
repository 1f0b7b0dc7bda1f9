"""The model: its weights as matrices, their masks, its blocks, and the processes among which it is shared."""
