"""prune: joins calibration, criteria and masks, and writes the zeros. sparsity: counts them.

Knows nothing of adapters: what comes after reads the zeros off the weights.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm import tqdm

from .blocks import Targets, base_layer, find_blocks, fused_experts, prunable_layers, tied_to_embedding
from .calibration import BlockRunner, Calibration, evaluation_mode, input_norms
from .criteria import Criterion, find_criterion
from .masks import GROUPS, Group, Pattern, SemiStructured, Unstructured, mask_of, parse_pattern, select, select_across
from .weights import stored_weight, weight_matrix, write_zeros


@dataclass(frozen=True)
class WeightReport:
    """One pruned weight: its name, its shape (out, in), and the fraction of its entries that are zero now."""

    name: str
    shape: tuple[int, int]
    sparsity: float


@dataclass(frozen=True)
class PruningReport:
    """What `prune` did. `sparsity` is the fraction of zeros over all pruned weights, `seconds` wall-clock time."""

    criterion: str
    pattern: str
    group: str | None
    sparsity: float
    seconds: float
    weights: tuple[WeightReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        group = f" per {self.group}" if self.group else ""
        return (
            f"pruned {len(self.weights)} weights to sparsity {self.sparsity:.4f} "
            f"({self.criterion}, {self.pattern}{group}) in {self.seconds:.1f} s"
        )


def prune(
    model: nn.Module,
    pattern: float | str | Pattern,
    *,
    criterion: str = "magnitude",
    group: Group | None = None,
    target_modules: Targets = None,
    exclude_modules: Targets = None,
    calibration: Calibration | None = None,
    prune_tied: bool = False,
) -> PruningReport:
    """Write zeros into the linear weights of the model's blocks. In place.

    Entries that are zero already go first, so pruning twice to one sparsity changes nothing, and pruning further only
    adds zeros. With a criterion that needs calibration the blocks are pruned in order, each on inputs that went
    through its pruned predecessors; all weights of one block are scored on the block as it was.

    Args:
        pattern: a sparsity in [0, 1), or "n:m" = n kept of every m along the inputs, or an `Unstructured` or
            `SemiStructured`.
        criterion: "magnitude", "random" or "wanda".
        group: which entries are compared: "row" (one output), "matrix" or "model"; by default that of the criterion's
            paper. n:m compares within each m entries and takes no group.
        target_modules: as in PEFT; by default every linear layer inside the blocks.
        exclude_modules: as in PEFT.
        calibration: token ids (sequences, tokens), or an iterable of model inputs. Tokens that an input's
            `attention_mask` marks as padding are not counted.
        prune_tied: allow a target whose weight is also an embedding; the embedding is then pruned with it.

    Raises:
        ValueError: bad pattern, criterion, group or targets; a tied weight without `prune_tied`; an n:m whose m does
            not divide the inputs; a weight or a statistic that is not finite; merged adapters; fused MoE experts.
    """
    started = time.perf_counter()
    parsed = parse_pattern(pattern)
    rule = find_criterion(criterion)
    chosen_group = _choose_group(group, parsed, rule)
    layers = prunable_layers(model, target_modules, exclude_modules)
    _check_model(model, layers, target_modules, prune_tied)
    _check_pattern_fits(parsed, layers)
    if rule.needs_inputs:
        _check_calibration(model, layers, criterion, calibration)
    _check_finite(layers)
    if rule.needs_inputs:
        assert calibration is not None
        _prune_by_block(model, layers, rule, parsed, chosen_group, calibration)
    elif chosen_group == "model":
        assert isinstance(parsed, Unstructured)
        _prune_across(layers, rule, parsed.sparsity)
    else:
        for layer in tqdm(layers.values(), desc="pruning", unit="weight", leave=False, disable=None):
            _prune_layer(layer, rule, parsed, chosen_group, None)
    counts = zero_counts(layers)
    return PruningReport(
        criterion=criterion,
        pattern=str(parsed),
        group=None if isinstance(parsed, SemiStructured) else chosen_group,
        sparsity=_share(counts.values()),
        seconds=time.perf_counter() - started,
        weights=tuple(
            WeightReport(name, _shape(layers[name]), zeros / size) for name, (zeros, size) in counts.items()
        ),
    )


def sparsity(model: nn.Module, target_modules: Targets = None, exclude_modules: Targets = None) -> float:
    """Return the fraction of zeros among the prunable weights, by default the linear weights of the blocks.

    Adapters are looked through: the base weights are counted, merged ones as they are.
    """
    return _share(zero_counts(prunable_layers(model, target_modules, exclude_modules)).values())


def zero_counts(layers: dict[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Return (zeros, entries) of each layer's weight, with one wait for the device in all."""
    weights = [stored_weight(base_layer(layer)).detach() for layer in layers.values()]
    kept = _to_host([mask_of(weight).sum() for weight in weights])
    return {
        name: (weight.numel() - nonzero, weight.numel())
        for name, weight, nonzero in zip(layers, weights, kept, strict=True)
    }


def _prune_layer(layer: nn.Module, rule: Criterion, pattern: Pattern, group: Group, input_norm: Tensor | None) -> None:
    layer = base_layer(layer)
    write_zeros(layer, select(_scores(layer, rule, input_norm), pattern, group))


@torch.no_grad()
def _scores(layer: nn.Module, rule: Criterion, input_norm: Tensor | None) -> Tensor:
    weight = weight_matrix(layer)
    return rule.score(weight, input_norm).masked_fill(~mask_of(weight), -torch.inf)


def _prune_across(layers: dict[str, nn.Module], rule: Criterion, fraction: float) -> None:
    seed = torch.initial_seed()

    def score_of(layer: nn.Module, index: int) -> Callable[[], Tensor]:
        def score() -> Tensor:
            # Scores are computed thrice and must come out the same, also those of a criterion that draws them.
            with torch.random.fork_rng(devices=[stored_weight(layer).device] if stored_weight(layer).is_cuda else []):
                torch.manual_seed(seed + index)
                return _scores(layer, rule, None)

        return score

    bases = [base_layer(layer) for layer in layers.values()]
    masks = select_across([score_of(layer, index) for index, layer in enumerate(bases)], fraction)
    for layer, mask in zip(bases, masks, strict=True):
        write_zeros(layer, mask)


def _prune_by_block(
    model: nn.Module,
    layers: dict[str, nn.Module],
    rule: Criterion,
    pattern: Pattern,
    group: Group,
    calibration: Calibration,
) -> None:
    blocks = find_blocks(model)
    inside: dict[str, dict[str, nn.Module]] = {name: {} for name in blocks}
    for name, layer in layers.items():
        inside[_block_of(name, blocks)][name] = layer
    with evaluation_mode(model):
        runner = BlockRunner(model, blocks, calibration)
        for index, block in enumerate(tqdm(blocks, desc="pruning", unit="block", disable=None)):
            try:
                norms = input_norms(runner, index, inside[block])
                for name, layer in inside[block].items():
                    _prune_layer(layer, rule, pattern, group, norms[name].value())
                if index < len(blocks) - 1:
                    runner.advance(index)
            except Exception as error:
                error.add_note(f"While pruning block {block!r}: the blocks before it are pruned, those after are not.")
                raise


def _shape(layer: nn.Module) -> tuple[int, int]:
    rows, columns = weight_matrix(base_layer(layer)).shape
    return rows, columns


def _block_of(name: str, blocks: dict[str, nn.Module]) -> str:
    while name not in blocks:
        name = name.rpartition(".")[0]
    return name


def _choose_group(group: Group | None, pattern: Pattern, rule: Criterion) -> Group:
    if group is not None and group not in GROUPS:
        raise ValueError(f"`group` must be one of {', '.join(map(repr, GROUPS))}, got {group!r}.")
    if group is not None and isinstance(pattern, SemiStructured):
        raise ValueError(f"{pattern} compares within each {pattern.m} inputs. Drop `group={group!r}`.")
    if group == "model" and rule.needs_inputs:
        raise ValueError(
            "A criterion that needs calibration prunes block by block and cannot compare across the model. Use "
            '`group="row"` or `group="matrix"`.'
        )
    return group or rule.group


def _check_model(model: nn.Module, layers: dict[str, nn.Module], targets: Targets, prune_tied: bool) -> None:
    merged = [name for name, layer in layers.items() if isinstance(layer, BaseTunerLayer) and layer.merged]
    if merged:
        raise ValueError(
            f"Layer {merged[0]!r} has merged adapters, and unmerging would bring pruned entries back. Call "
            "`unmerge_adapter()` or `merge_and_unload()` first."
        )
    if targets is None and (experts := fused_experts(model)):
        raise ValueError(
            f"The experts of this model are fused in one parameter ({experts[0]!r}), which `prune` does not handle "
            "yet. "
            'Prune the other layers only with `target_modules="all-linear"`.'
        )
    tied = tied_to_embedding(model, layers)
    if tied and not prune_tied:
        raise ValueError(
            f"The weight of {tied[0]!r} is also the embedding: pruning it prunes every token's vector. Add it to "
            "`exclude_modules`, or pass `prune_tied=True` if you mean it."
        )
    for name, layer in layers.items():
        weight = stored_weight(base_layer(layer))
        if weight.is_meta or not weight.is_floating_point():
            raise ValueError(
                f"The weight of {name!r} is {weight.dtype} on {weight.device}; pruning needs loaded floating-point "
                "weights. Prune before quantising, and load the model before pruning."
            )


def _check_pattern_fits(pattern: Pattern, layers: dict[str, nn.Module]) -> None:
    if not isinstance(pattern, SemiStructured) or pattern.allow_ragged:
        return
    inputs = {name: _shape(layer)[1] for name, layer in layers.items()}
    ragged = [name for name, columns in inputs.items() if columns % pattern.m]
    if ragged:
        raise ValueError(
            f"{pattern} needs inputs divisible by {pattern.m}, but {ragged[0]!r} has {inputs[ragged[0]]} "
            f"({len(ragged)} such layers). Exclude them, or pass SemiStructured({pattern.n}, {pattern.m}, "
            "allow_ragged=True), for which no N:M kernel exists."
        )


def _check_calibration(
    model: nn.Module, layers: dict[str, nn.Module], criterion: str, calibration: Calibration | None
) -> None:
    if calibration is None:
        raise ValueError(
            f"Criterion {criterion!r} measures the inputs of each layer: pass `calibration`, token ids of shape "
            "(sequences, tokens) or an iterable of model inputs."
        )
    blocks = tuple(f"{name}." for name in find_blocks(model))
    outside = [name for name in layers if not name.startswith(blocks)]
    if outside:
        raise ValueError(
            f"Criterion {criterion!r} measures inputs block by block, and {outside[0]!r} lies outside the blocks. "
            "Leave "
            'it out, or prune it on its own with `criterion="magnitude"`.'
        )


def _check_finite(layers: dict[str, nn.Module]) -> None:
    finite = _to_host([stored_weight(base_layer(layer)).detach().isfinite().all() for layer in layers.values()])
    if not all(finite):
        name = list(layers)[finite.index(False)]
        raise ValueError(f"The weight of {name!r} holds NaN or infinity. Nothing was pruned; mend the checkpoint.")


def _to_host(scalars: list[Tensor]) -> list[Any]:
    # Stacked on one device first, so that the host waits once and not once per layer.
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).tolist()


def _share(counts: Iterable[tuple[int, int]]) -> float:
    zeros, sizes = zip(*counts, strict=True)
    return sum(zeros) / sum(sizes)
