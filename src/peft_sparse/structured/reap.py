"""Removes whole experts by how much they add to the output of their mixture, as REAP does."""

import contextlib
import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..calibration.activations import Activations
from ..calibration.batch import Batch
from ..calibration.inputs import evaluation_mode, in_words
from ..calibration.observing import refuse_rows
from ..calibration.padding import Padding, RowsUnknown
from ..calibration.proof import prove
from ..calibration.residence import Residence
from ..calibration.runner import stack_runners
from ..model.blocks import Targets, base_model
from ..model.environment import peak_memory
from ..model.processes import add_up, working_together
from ..model.weights import WeightView, check_finite
from .cutting import Cuts
from .experts import Experts, check_experts, find_experts, known_experts, set_count
from .novices import install
from .report import StructuredReport, UnitsReport
from .routing import Input, Removal, Seen, as_routed, observed, without_router_loss
from .saving import make_savable, put_back_unless_finished


class Saliency:
    """Sums over the tokens that were sent to the experts of one mixture.

    Args:
        experts: the mixture.
        hidden: number of features of an output.
        means: whether the mean output of each expert is needed.
    """

    def __init__(self, experts: Experts, hidden: int, means: bool) -> None:
        self.name = experts.name
        device = next(experts.module.parameters()).device
        self.norms = torch.zeros(experts.count, device=device)
        self.tokens = torch.zeros(experts.count, dtype=torch.int64, device=device)
        self.outputs = torch.zeros(experts.count if means else 0, hidden, device=device)
        self.padding = Padding()

    def before_call(self, batch: Batch, constants: list[Tensor]) -> None:
        """Note which tokens of the next call count."""
        self.padding = batch.padding

    def add(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Add the tokens of one call of the experts."""
        routed = as_routed(args, kwargs)
        assert routed is not None, "`observed` checked the calls"
        try:
            kept = self.padding.of_rows(routed.states.shape[:1], from_context=False)
        except RowsUnknown:
            refuse_rows(self.name, len(routed.states))
        rows = slice(None) if kept is None else kept.to(routed.states.device)
        outputs = routed.outputs(module.forward)[rows].float()
        norms = routed.weights[rows].float() * torch.linalg.vector_norm(outputs, dim=-1)
        home = self.norms.device
        chosen = routed.chosen[rows].flatten().long().to(home)
        self.norms.index_add_(0, chosen, norms.flatten().to(home))
        self.tokens.index_add_(0, chosen, torch.ones_like(chosen))
        if len(self.outputs):
            self.outputs.index_add_(0, chosen, outputs.flatten(0, 1).to(home))

    def score(self) -> Tensor:
        """Return S_j of each expert, (experts,); 0 for an expert that no token reached.

        Raises:
            ValueError: a sum is not finite.
        """
        scores = (self.norms / self.tokens.clamp_min(1)).cpu()
        if not bool(scores.isfinite().all()):
            raise ValueError(
                f"Expected finite outputs of the experts of {self.name!r} on the calibration data, got NaN or "
                "infinity. Check the calibration data, or run the model in float32 or bfloat16."
            )
        return scores

    def means(self, chosen: Tensor) -> Tensor:
        """Return the mean output of the experts in the mask `chosen`, (chosen, hidden); 0 where there was no token."""
        means = self.outputs / self.tokens.clamp_min(1)[:, None]
        return means[chosen.to(means.device)]


def prune_experts(
    model: nn.Module,
    ratio: float,
    inputs: list[dict[str, Any]],
    targets: tuple[Targets, Targets],
    replace: bool,
    activations: Activations,
    residence: Residence,
) -> StructuredReport:
    """Remove the fraction `ratio` of the experts of each chosen mixture. In place; see `prune_structured`.

    Args:
        model: the model.
        ratio: fraction of the experts to remove, in [0, 1), rounded up to whole experts.
        inputs: model inputs, as `as_inputs` returns them.
        targets: `target_modules` and `exclude_modules`.
        replace: whether a constant, the mean output, takes the place of each removed expert.
        activations: where hidden states wait between blocks.
        residence: (name, block) -> a context within which the block's weights are on the device that computes.
    """
    started = time.perf_counter()
    inner = base_model(model)
    inputs = [without_router_loss(inner, batch) for batch in inputs]
    sets = find_experts(inner, *targets)
    check_experts(sets)
    check_finite({name: view for experts in sets for name, view in _views(experts).items()})
    seen_inputs, seen = observed(inner, sets, inputs)
    for experts in sets:
        _check_choices(experts, ratio, seen[experts.name], replace)
    _try(inner, sets, ratio, seen_inputs, seen, replace)
    measured = _measured(model, sets, inputs, seen, replace, activations, residence)
    scores = [saliency.score() for saliency in measured]
    kept = [(e, select_experts(score, ratio, e.groups)) for e, score in zip(sets, scores, strict=True)]
    novices = {e.name: s.means(~mask) for (e, mask), s in zip(kept, measured, strict=True) if replace}
    layers = tuple(
        UnitsReport(
            name=experts.label,
            kind="experts",
            units=experts.count,
            kept=int(mask.sum()),
            heads_per_unit=1,
            cost=experts.cost(with_router=not replace),
            removed_units=tuple((~mask).nonzero().flatten().tolist()),
            unreached_units=tuple((saliency.tokens == 0).nonzero().flatten().tolist()),
        )
        for (experts, mask), saliency in zip(kept, measured, strict=True)
    )
    _remove(inner, Removal(inner, seen_inputs, kept, novices), kept, novices, keep=True)
    return StructuredReport(
        metric="reap",
        structure="ul-um",
        ratio=ratio,
        compensated=replace,
        parameters_added=sum(constants.numel() for constants in novices.values()),
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
        layers=layers,
    )


def select_experts(scores: Tensor, ratio: float, groups: int = 1) -> Tensor:
    """Return the mask (experts,) of the experts to keep. The experts with the lowest scores are removed.

    Of experts with equal scores, those with the lowest index are removed first.

    Args:
        scores: S_j of each expert, (experts,).
        ratio: the fraction of the experts of each group that is removed. Their number is rounded up.
        groups: how many groups the experts form. A group is a run of consecutive experts. Every group loses the same
            number of experts.
    """
    by_group = scores.view(groups, -1)
    count = math.ceil(round(ratio * by_group.shape[1], 6))
    removed = by_group.argsort(dim=1, stable=True)[:, :count]
    return torch.ones_like(by_group, dtype=torch.bool).scatter(1, removed, False).flatten()


def _check_choices(experts: Experts, ratio: float, seen: Seen, replace: bool) -> None:
    left = int(select_experts(torch.zeros(experts.count, device="cpu"), ratio, experts.groups).sum())
    needed = 1 if replace else seen.k
    if left < needed:
        raise ValueError(
            f"`ratio={ratio:g}` would leave {left} of the {experts.count} experts of {experts.label!r}, and its "
            f"router sends each token to {seen.k} of them. Use a `ratio` of at most "
            f"{math.floor(1e4 * (1 - math.ceil(needed / experts.groups) * experts.groups / experts.count)) / 1e4:g}."
        )


def _try(
    model: nn.Module, sets: list[Experts], ratio: float, inputs: list[Input], seen: dict[str, Seen], replace: bool
) -> None:
    """Show, before calibration, that as many experts as `ratio` says can be removed: every second one, or more."""
    order = {experts.name: torch.arange(experts.count, device="cpu") % 2 for experts in sets}
    trial = [(experts, select_experts(order[experts.name], ratio, experts.groups)) for experts in sets]
    constants = {}
    for experts, mask in trial if replace else ():
        gone, hidden = int((~mask).sum()), seen[experts.name].hidden
        constants[experts.name] = torch.linspace(-1, 1, gone * hidden, device="cpu").view(gone, hidden)
    _remove(model, Removal(model, inputs, trial, constants), trial, constants, keep=False)


class _TrialEnded(Exception):
    """Ends a trial, so that the experts are put back."""


def _remove(
    model: nn.Module,
    removal: Removal,
    kept: list[tuple[Experts, Tensor]],
    novices: dict[str, Tensor],
    *,
    keep: bool,
) -> None:
    """Cut out experts and check the result. Without `keep`, or if it is wrong, the model is as before afterwards."""
    savable = isinstance(model, PreTrainedModel) and keep
    with contextlib.suppress(_TrialEnded), Cuts() as cuts, contextlib.ExitStack() as undo:
        if savable:
            undo.enter_context(put_back_unless_finished(model))
        everything = not novices and {experts.name for experts in known_experts(model)} == {e.name for e, _ in kept}
        for experts, mask in kept:
            if mask.all():
                continue
            if experts.name in novices:
                install(experts, mask, novices[experts.name], cuts)
            else:
                experts.cut(mask, cuts)
        sizes = {(experts.count, int(mask.sum())) for experts, mask in kept}
        if everything and len(sizes) == 1:
            # Some models hold the number of experts for a loss of their routers.
            for module in model.modules():
                set_count(module, *next(iter(sizes)), cuts)
        if savable and any(not mask.all() for _, mask in kept):
            make_savable(model)
        removal.check()
        if not keep:
            raise _TrialEnded


def _measured(
    model: nn.Module,
    sets: list[Experts],
    inputs: list[dict[str, Any]],
    seen: dict[str, Seen],
    means: bool,
    activations: Activations,
    residence: Residence,
) -> list[Saliency]:
    """Return the sums of every mixture of `sets` over all calibration tokens, of all processes."""
    measured = {experts.name: Saliency(experts, seen[experts.name].hidden, means) for experts in sets}
    what = f"the experts of {len(sets)} layers by {in_words(inputs)}"
    with evaluation_mode(model), working_together(what):

        def inside(block: str) -> dict[str, WeightView]:
            return {key: view for e in sets if e.block == block for key, view in _views(e).items()}

        proof = prove(model, inputs, inside, residence)
        for runner in stack_runners(
            model,
            inputs,
            inside,
            activations=activations,
            residence=residence,
            proof=proof,
        ):
            for index in tqdm(runner.order, desc="measuring", unit="block", disable=None):
                with runner.resident(index):
                    for experts in (e for e in sets if e.block == runner.names[index]):
                        with _observing(experts, measured[experts.name]) as saliency:
                            runner.run(index, saliency.before_call)
                    runner.advance(index)
        for saliency in measured.values():
            add_up([saliency.norms, saliency.tokens, saliency.outputs])
    return list(measured.values())


@contextlib.contextmanager
def _observing(experts: Experts, saliency: Saliency) -> Iterator[Saliency]:
    hook = experts.module.register_forward_hook(partial(Saliency.add, saliency), with_kwargs=True)
    try:
        yield saliency
    finally:
        hook.remove()


def _views(experts: Experts) -> dict[str, WeightView]:
    return {key: view for name, fused in experts.weights.items() for key, view in fused.views(name).items()}
