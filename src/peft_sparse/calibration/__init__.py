"""Calibration: runs a model on text and measures the inputs of its weights."""
