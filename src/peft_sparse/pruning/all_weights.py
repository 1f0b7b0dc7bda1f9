"""What needs all weights at once: sparsity shared out among them, and one comparison over all of them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.activations import Activations
from ..calibration.measure import measured_blocks
from ..calibration.runner import Residence
from ..model.blocks import block_of, find_blocks
from ..model.weights import WeightView
from .allocation import Allocation, allocate, owl_semi_structured
from .one_weight import scores_of
from .patterns import Pattern, SemiStructured, Unstructured, select_across
from .task import PruningTask, values_by_name


def allocated_patterns(
    model: nn.Module,
    task: PruningTask,
    allocation: Allocation | Mapping[str, float],
    inputs: list[dict[str, Any]] | None,
    activations: Activations,
    residence: Residence,
) -> dict[str, Pattern]:
    """Return the pattern of each weight of `task`, whose one pattern is shared out by `allocation`.

    Raises:
        ValueError: as `allocate`.
    """
    pattern = next(iter(task.patterns.values()))
    place = {name: block for block, names in task.by_block.items() for name in names}
    norms: dict[str, Tensor] | None = None
    if allocation == "owl" and inputs is not None:
        measured = measured_blocks(model, inputs, task.inside, ("inputs",), activations, residence)
        norms = {name: block.inputs[name].input_norm for name, block in measured}
    if isinstance(pattern, SemiStructured):
        return dict(owl_semi_structured(task.weights, pattern, blocks=place, input_norms=norms))
    method = allocation if isinstance(allocation, str) else values_by_name(allocation, task.weights, "allocation")
    counts = allocate(method, task.weights, pattern.sparsity, blocks=place, input_norms=norms)
    # Zeros / entries is a sparsity that prunes exactly that many. What is zero as a whole is so without being pruned.
    shares = {name: counts[name] / weight.matrix().numel() for name, weight in task.weights.items()}
    return {name: Unstructured(share if share < 1 else 0.0, exact=True) for name, share in shares.items()}


def prune_across(
    model: nn.Module,
    task: PruningTask,
    inputs: list[dict[str, Any]] | None,
    activations: Activations,
    residence: Residence,
) -> None:
    """Prune by one comparison over all weights, measured on the model as it is."""
    blocks = find_blocks(model)
    known = {name: task.statistics(name, None) for name in task.weights}
    if inputs is not None:
        measured = measured_blocks(model, inputs, task.inside, task.needs, activations, residence)
        known |= {name: task.statistics(name, block) for name, block in measured}
    pattern = next(iter(task.patterns.values()))
    assert isinstance(pattern, Unstructured)
    seed = torch.initial_seed()

    def score_of(name: str, weight: WeightView, index: int) -> Callable[[], Tensor]:
        def score() -> Tensor:
            # Scores are computed thrice and must come out the same, also those of a criterion that draws them.
            with _resident(name, residence, blocks):
                matrix = weight.matrix()
                with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
                    torch.manual_seed(seed + index)
                    return scores_of(name, matrix, task.rule, known[name])

        return score

    scores = [score_of(name, weight, index) for index, (name, weight) in enumerate(task.weights.items())]
    masks = select_across(scores, pattern.sparsity)
    for weight, mask in zip(task.weights.values(), masks, strict=True):
        weight.write_zeros(mask.to(weight.storage.device))


@contextlib.contextmanager
def _resident(name: str, residence: Residence, blocks: dict[str, nn.Module]) -> Iterator[None]:
    block = block_of(name, blocks)
    with contextlib.nullcontext() if block is None else residence(block, blocks[block]):
        yield
