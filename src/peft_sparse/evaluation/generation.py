"""Measures how fast models generate, beside each other."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..calibration.inputs import evaluation_mode
from ..model.offload import execution_device


PROMPT = 32


@dataclass(frozen=True)
class GenerationSpeed:
    """How fast a model generates one sequence.

    Args:
        tokens_per_second: the median over the rounds. The time of the prompt is part of it.
        ratio: the median over the rounds of the speed divided by that of the first model in the same round.
        lowest: the lowest of these ratios.
        highest: the highest of these ratios. If 1 lies between them, the rounds do not show which model is faster.
    """

    tokens_per_second: float
    ratio: float
    lowest: float
    highest: float


def generation_speeds(
    models: Mapping[str, Any], *, new_tokens: int = 32, rounds: int = 5, seed: int = 0
) -> dict[str, GenerationSpeed]:
    """Return how fast each model generates, measured alternately.

    In each round every model generates one sequence, greedily and with its cache, from a prompt of 32 random tokens.
    Every other round goes in the opposite order. What slows the machine for a while then slows all models. Ratios are
    taken within a round. A first round is not counted.

    Args:
        models: causal language models by name. All of them must fit into memory. The first is the one that others are
            compared with.
        new_tokens: how many tokens are generated.
        rounds: how many rounds are counted.
        seed: seed of the prompt.

    Raises:
        ValueError: `new_tokens` or `rounds` is below 1.
        TypeError: a model cannot generate.
    """
    if new_tokens < 1 or rounds < 1:
        raise ValueError(f"Expected `new_tokens` and `rounds` of 1 or more, got {new_tokens} and {rounds}.")
    for name, model in models.items():
        if not hasattr(model, "generate"):
            raise TypeError(
                f"Expected models that generate, and {name!r} is a {type(model).__name__}. Give causal language "
                "models, as `AutoModelForCausalLM` loads them."
            )
    size = min(model.config.get_text_config().vocab_size for model in models.values())
    prompt = torch.randint(size, (1, PROMPT), generator=torch.Generator().manual_seed(seed))
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name in list(models)[:: 1 if number % 2 else -1]:
            seconds = _seconds(models[name], prompt, new_tokens)
            if number:
                times[name].append(seconds)
    first = next(iter(times.values()))
    speeds = {}
    for name, found in times.items():
        ratios = [a / b for a, b in zip(first, found, strict=True)]
        speeds[name] = GenerationSpeed(
            new_tokens / statistics.median(found), statistics.median(ratios), min(ratios), max(ratios)
        )
    return speeds


@torch.no_grad()
def _seconds(model: nn.Module, prompt: torch.Tensor, new_tokens: int) -> float:
    """Return the seconds that a model takes for exactly `new_tokens` tokens."""
    given = prompt.to(execution_device(model))
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "num_beams": 1}
    generate: Any = model.generate
    with evaluation_mode(model):
        synchronize(given.device)
        started = time.perf_counter()
        generate(input_ids=given, attention_mask=torch.ones_like(given), pad_token_id=0, **options)
        synchronize(given.device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait for the work of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
