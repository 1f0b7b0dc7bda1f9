"""From a model and text to statistics of the inputs of its weights."""
