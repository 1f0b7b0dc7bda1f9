"""Measures the statistics of the inputs of a block's weights, while the block runs on calibration data.

Inputs that several weights share, such as those of the query, key and value projections, are measured once. Processes
that share the batches add up their statistics once per block.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..model.processes import add_up, exchange
from ..model.weights import WeightView
from .activations import Activations
from .batch import Batch
from .findings import Proof
from .observing import InputObserver, Sight
from .proof import check_sizes
from .residence import Residence
from .runner import BlockRunner, stack_runners
from .statistics import BlockStatistics, InputStatistics, Need, Statistics, sampled_per_batch, spread_rows


def measure(
    model: nn.Module,
    runner: BlockRunner,
    index: int,
    weights: dict[str, WeightView],
    needs: tuple[Need, ...],
    sight: Sight | None = None,
) -> BlockStatistics:
    """Run block `index` of `runner` and return the statistics of the inputs of `weights`.

    If other blocks of the stack share some of the weights, the inputs that these get there count, too.

    Args:
        model: the model.
        runner: the runner of the block's stack.
        index: number of the block in its stack.
        weights: weights inside the block, by name.
        needs: what to measure.
        sight: how inputs are seen that the calls of layers do not show.

    Raises:
        ValueError: a weight got no input, inputs that are all zero, or inputs that are not finite.
    """
    sharing = runner.sharing(index, weights.values())
    # A block that runs again, or before one that shares its weights, must return what the next run takes.
    stopping = runner.blocks[index] if runner.runs(index) <= 1 and not sharing else None
    return measure_inputs(
        model,
        weights,
        needs,
        runner.batches_in_all,
        partial(runner.run, index, sharing=sharing),
        shared=runner.shared,
        stopping=stopping,
        sight=sight,
    )


def measured_blocks(
    model: nn.Module,
    inputs: list[dict[str, Any]],
    inside: Callable[[str], dict[str, WeightView]],
    needs: tuple[Need, ...],
    activations: Activations,
    residence: Residence,
    proof: Proof | None = None,
) -> Iterator[tuple[str, BlockStatistics]]:
    """Yield (name of a weight, statistics of its block), block by block. No weight is changed.

    Args:
        model: the model.
        inputs: model inputs, as `as_inputs` returns them.
        inside: name of a block -> the weights to measure in it, by name.
        needs: what to measure.
        activations: where hidden states wait between blocks: "device", "cpu" or "disk".
        residence: (name, block) -> a context within which the block's weights are on the device that computes.
        proof: what `prove` found out about the model.

    Raises:
        ValueError: a weight got no input, inputs that are all zero, or inputs that are not finite; no batch runs the
            blocks of a stack.
    """
    proof = proof or Proof()
    for runner in stack_runners(
        model,
        inputs,
        inside,
        activations=activations,
        residence=residence,
        proof=proof,
    ):
        for index in tqdm(runner.order, desc="measuring", unit="block", disable=None):
            weights = inside(runner.names[index])
            with runner.resident(index):
                if weights:
                    measured = measure(model, runner, index, weights, needs, proof.sight)
                    yield from ((name, measured) for name in measured.inputs)
                runner.advance(index)


def measure_inputs(
    model: nn.Module,
    weights: dict[str, WeightView],
    needs: tuple[Need, ...],
    batches: int,
    run: Callable[[Callable[[Batch, list[Tensor]], None]], None],
    *,
    shared: bool = False,
    stopping: nn.Module | None = None,
    sight: Sight | None = None,
) -> BlockStatistics:
    """Return the statistics of the inputs that `weights` get while `run` runs all batches.

    Args:
        model: the model.
        weights: the weights, by name.
        needs: what to measure.
        batches: number of batches, of all processes if `shared`.
        run: runs all batches of this process. It must call its argument before each call of the block, with the batch
            and with the tensors among the arguments that do not come from the stack.
        shared: whether `run` runs only the share of this process. The statistics are over the batches of all
            processes.
        stopping: the block that `run` runs, if its output is not needed. It may then be left before its end.
        sight: how inputs are seen that the calls of layers do not show.

    Raises:
        ValueError: a weight got no input, inputs that are all zero, or inputs that are not finite. An expert may get
            none, and is then missing in what is returned.
    """
    experts = {name for name, weight in weights.items() if weight.expert is not None}
    experts |= sight.experts if sight is not None else set()
    sharing = True
    while True:
        try:
            leaders, measured, squares = _summed(model, weights, needs, batches, run, stopping, sight, sharing)
            if shared:
                leaders, measured = _over_processes(weights, leaders, measured, needs)
            break
        except _SharingChanged:
            sharing = False
    for statistics in measured.values():
        statistics.finish()
    _check(weights, leaders, measured, experts)
    # Where the block was left early, the outputs of its last layers are not known for every batch.
    seen = {n: total for n, (total, calls) in squares.items() if calls == measured[leaders[n]].updates}
    # The order is that in which the inputs came. Weights with the same inputs follow each other.
    inputs = {n: measured[leader] for leader in measured for n in weights if leaders.get(n) == leader}
    return BlockStatistics(inputs, seen, shared)


class _SharingChanged(Exception):
    """Weights shared their input on one call and not on another, so each needs sums of its own."""


def _summed(
    model: nn.Module,
    weights: dict[str, WeightView],
    needs: tuple[Need, ...],
    batches: int,
    run: Callable[[Callable[[Batch, list[Tensor]], None]], None],
    stopping: nn.Module | None,
    sight: Sight | None,
    sharing: bool,
) -> tuple[dict[str, str], dict[str, InputStatistics], dict[str, tuple[Tensor, int]]]:
    """Run all batches. Return the leader of each weight, the sums of each leader, and ||W X||² of some weights.

    Beside ||W X||² stands the number of calls that it is the sum over.
    A leader is the first of the weights that share their input; without `sharing`, each weight is its own.
    """
    leaders: dict[str, str] = {}
    measured: dict[str, InputStatistics] = {}
    squares: dict[str, tuple[Tensor, int]] = {}
    quota = sampled_per_batch(batches)
    calls = dict.fromkeys(weights, 0)

    def record(name: str, leader: str, rows: Callable[[], Tensor]) -> None:
        leader = leader if sharing else name
        _note_leader(leaders, name, leader)
        calls[name] += 1
        if name == leader:
            if name not in measured:
                measured[name] = InputStatistics("hessian" in needs, quota, "moments" in needs)
            measured[name].update(rows())

    def record_outputs(name: str, rows: Callable[[], Tensor]) -> None:
        square = _square_of_product(weights[name], spread_rows(rows(), quota))
        total, calls = squares.get(name, (None, 0))
        squares[name] = square if total is None else total.add_(square), calls + 1

    observer = InputObserver(model, weights, record, record_outputs, stopping, sight)
    with observer.hooks():
        run(observer.before_call)
    # A leader that was called more often has sums of other inputs, too.
    if any(calls[name] != calls[leader] for name, leader in leaders.items()):
        raise _SharingChanged
    return leaders, measured, squares


def _note_leader(leaders: dict[str, str], name: str, leader: str) -> None:
    if leaders.setdefault(name, leader) != leader:
        raise _SharingChanged


def _over_processes(
    weights: dict[str, WeightView],
    leaders: dict[str, str],
    measured: dict[str, InputStatistics],
    needs: tuple[Need, ...],
) -> tuple[dict[str, str], dict[str, InputStatistics]]:
    """Return `leaders` and `measured` over all processes, in the same order in each process.

    The entries of `measured` are changed in place. A process may have measured nothing for some weights: it may have
    no batch, or the model may have sent none of its tokens to an expert.
    """
    own = {name: (s.columns, s.sums[-1].dtype, s.tokens) for name, s in measured.items()}
    layouts = exchange((leaders, own))
    everywhere: dict[str, str] = {}
    complete: dict[str, InputStatistics] = {}
    for own_leaders, own_layouts in layouts:
        for name, leader in own_leaders.items():
            _note_leader(everywhere, name, leader)
        for name, (columns, dtype, _) in own_layouts.items():
            if name not in complete:
                statistics = measured.get(name) or InputStatistics("hessian" in needs, 0, "moments" in needs)
                statistics.start(columns, dtype, weights[name].storage.device)
                complete[name] = statistics
    for name, statistics in complete.items():
        statistics.tokens = sum(own_layouts[name][2] for _, own_layouts in layouts if name in own_layouts)
    add_up([sums for statistics in complete.values() for sums in statistics.sums])
    return everywhere, complete


def relative_error(lost: Tensor, whole: Tensor) -> Tensor:
    """Return ||(W - W')X|| / ||WX|| from the squares `lost` and `whole`, elementwise. It is 0 where WX is 0."""
    return torch.where(whole > 0, (lost / whole).sqrt(), whole)


def _square_of_product(weight: WeightView, outputs: Tensor) -> Tensor:
    """Return ||W X||² from the outputs (tokens, out) of the layer, from which its bias is subtracted."""
    bias: Tensor | None = getattr(weight.layer, "bias", None)
    outputs = outputs.float()
    return (outputs if bias is None else outputs - bias.detach().float()).square().sum()


def warn_of_few_tokens(name: str, statistics: Statistics) -> bool:
    """Warn if X has fewer rows than columns, so that XᵀX is singular. Return whether a warning was given."""
    assert statistics.hessian is not None
    columns = statistics.hessian.shape[-1]
    if statistics.tokens >= columns:
        return False
    warnings.warn(
        f"The Hessian of {name!r} has {columns} columns and was measured on {statistics.tokens} tokens. It is "
        f"singular, and can be solved only with damping. Use at least {columns} tokens, better ten times as many.",
        stacklevel=2,
    )
    return True


def _check(
    weights: dict[str, WeightView],
    leaders: dict[str, str],
    measured: dict[str, InputStatistics],
    experts: set[str],
) -> None:
    for name in weights:
        if name in leaders and measured[leaders[name]].tokens == 0:
            leaders.pop(name)
        assert name in leaders or name in experts, f"{name!r} got no input, which the proof would have refused"
    for unused in measured.keys() - leaders.values():
        measured.pop(unused)
    if not measured:
        return
    check_sizes({name: statistics.input_norm.sum() for name, statistics in measured.items()})
