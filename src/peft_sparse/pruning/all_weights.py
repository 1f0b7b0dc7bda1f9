"""Treats all weights at once: divides a sparsity among them, or compares the scores of all of them."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.activations import Activations
from ..calibration.findings import Proof
from ..calibration.measure import measured_blocks
from ..calibration.residence import Residence
from ..model.blocks import block_of
from ..model.weights import WeightView
from .allocation import allocate
from .budget import Budget, Reading, in_memory
from .by_name import values_by_name
from .offloaded import one_layer_at_a_time
from .one_weight import scores_of
from .owl import OWL
from .patterns import Pattern, SemiStructured, Unstructured, select_across
from .sparsegpt import SparseGPT
from .task import PruningTask


def allocated_patterns(
    model: nn.Module,
    task: PruningTask,
    inputs: list[dict[str, Any]] | None,
    activations: Activations,
    residence: Residence,
    reading: Reading = in_memory,
    proof: Proof | None = None,
) -> dict[str, Pattern]:
    """Return the pattern of each weight of `task`. Its one sparsity is divided among the weights by `task.allocation`.

    Args:
        model: the model. `OWL` measures input norms on it as it is now.
        task: a task with an allocation.
        inputs: the calibration data as model inputs, None without calibration.
        activations: where hidden states wait between blocks.
        residence: (block name, block) -> a context within which the block can run.
        reading: weight name -> a context within which the weight is in memory.
        proof: what `prove` found out about the model, None without calibration.

    Raises:
        ValueError: see `allocate`.
    """
    pattern, allocation = next(iter(task.patterns.values())), task.allocation
    assert allocation is not None, "the caller asks only if there is an allocation"
    place = {name: block for block, names in task.by_block.items() for name in names}
    norms: dict[str, Tensor] | None = None
    if not isinstance(allocation, Mapping) and "inputs" in allocation.needs and inputs is not None:
        measured = measured_blocks(model, inputs, task.inside, ("inputs",), activations, residence, proof)
        norms = {name: _by_row(block.inputs[name].input_norm, task.weights[name]) for name, block in measured}
        # Outliers of experts that no token reached are those of their magnitudes.
        norms |= {
            n: torch.ones(w.shape[1], device=w.storage.device) for n, w in task.weights.items() if n not in norms
        }
    if isinstance(pattern, SemiStructured):
        assert isinstance(allocation, OWL), "the task refuses other allocations of n:m"
        return dict(allocation.mixed(Budget(task.weights, pattern.sparsity, place, norms, reading), pattern))
    if isinstance(allocation, Mapping):
        allocation = values_by_name(allocation, task.weights, "allocation")
    counts = allocate(allocation, task.weights, pattern.sparsity, blocks=place, input_norms=norms, reading=reading)
    # Zeros / entries is a sparsity that prunes exactly this number. A sparsity of 1 is not allowed: a weight that has
    # only zeros gets 0, which prunes nothing more.
    shares = {name: counts[name] / weight.matrix().numel() for name, weight in task.weights.items()}
    return {name: Unstructured(share if share < 1 else 0.0) for name, share in shares.items()}


def prune_across(
    model: nn.Module,
    task: PruningTask,
    inputs: list[dict[str, Any]] | None,
    activations: Activations,
    residence: Residence,
    proof: Proof | None,
) -> None:
    """Prune by one comparison of the scores of all weights. The inputs are measured before any weight is pruned."""
    known = {name: task.statistics(name, None) for name in task.weights}
    if inputs is not None:
        measured = measured_blocks(model, inputs, task.inside, task.needs, activations, residence, proof)
        reached = {name: task.statistics(name, block) for name, block in measured}
        unreached = [name for name in task.weights if name not in reached]
        if unreached and task.needs:
            raise ValueError(
                f"No calibration token reaches {unreached[0]!r} ({len(unreached)} such weights of experts), so its "
                "scores cannot be compared with those of other weights. Use more calibration sequences, or "
                '`group="row"` or "matrix".'
            )
        known |= reached
    pattern, rule = next(iter(task.patterns.values())), task.rule
    assert isinstance(pattern, Unstructured)
    assert not isinstance(rule, SparseGPT), "SparseGPT takes no group"
    seed = torch.initial_seed()

    def score_of(name: str, weight: WeightView, index: int) -> Callable[[], Tensor]:
        def score() -> Tensor:
            resident.enter(block_of(name, task.blocks))
            matrix = weight.matrix()
            # Scores are computed three times and must be equal, also those of a criterion that draws random numbers.
            with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
                torch.manual_seed(seed + index)
                return scores_of(name, matrix, rule, known[name])

        return score

    # Each pass takes the weights block by block, so that each block is moved once per pass.
    weights = {name: task.weights[name] for names in task.by_block.values() for name in names}
    scores = [score_of(name, weight, index) for index, (name, weight) in enumerate(weights.items())]
    with _Resident(residence, task.blocks) as resident:
        masks = select_across(scores, pattern.sparsity)
    with one_layer_at_a_time(weights) as writing:
        for (name, weight), mask in zip(weights.items(), masks, strict=True):
            with writing(name):
                weight.write_zeros(mask.to(weight.storage.device))


def _by_row(norms: Tensor, weight: WeightView) -> Tensor:
    """Return input norms (in,) as they are, and those of groups (groups, in) for each row of `weight` (out, in)."""
    return norms if norms.dim() == 1 else norms.repeat_interleave(weight.shape[0] // len(norms), 0)


class _Resident(contextlib.AbstractContextManager[Any]):
    """Keeps the block of the last weight where it computes, until the weight of another block is next."""

    def __init__(self, residence: Residence, blocks: dict[str, nn.Module]) -> None:
        self.residence = residence
        self.blocks = blocks
        self.block: str | None = None
        self.undo = contextlib.ExitStack()

    def enter(self, block: str | None) -> None:
        if block == self.block:
            return
        self.undo.close()
        self.block = None
        if block is not None:
            self.undo.enter_context(self.residence(block, self.blocks[block]))
            self.block = block

    def __exit__(self, *error: object) -> None:
        self.undo.close()
