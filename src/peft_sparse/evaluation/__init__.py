"""Evaluation: perplexity, zero-shot tasks, generation and kernels, of one model or of several side by side."""

from .comparison import Comparison, compare_models
from .generation import GenerationSpeed, generation_speeds
from .kernels import KernelReport, kernel_speed
from .loading import LoadedModel, load_model
from .protocol import TextPerplexity, metric_path, text_perplexity
from .tasks import TaskReport, evaluate_tasks


__all__ = [
    "Comparison",
    "GenerationSpeed",
    "KernelReport",
    "LoadedModel",
    "TaskReport",
    "TextPerplexity",
    "compare_models",
    "evaluate_tasks",
    "generation_speeds",
    "kernel_speed",
    "load_model",
    "metric_path",
    "text_perplexity",
]
