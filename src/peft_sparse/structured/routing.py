"""Observes to which experts a model sends its tokens, and proves that experts can be removed.

Experts are called with the states of all tokens, the experts that were chosen for each token, and their weights g:

    output(x) = sum over the chosen experts j of g_j(x) f_j(x)

`observed` shows that this is so. `Removal` shows that the model without some experts computes what the whole model
computes when its router cannot choose them, or when their output is a constant.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..model.blocks import find_blocks
from .experts import Experts
from .proof import Run, Trace, check_same, inputs_that_run, is_close, trace_of


@dataclass(frozen=True)
class Routed:
    """A call of experts.

    Args:
        states: x of each token, (tokens, hidden).
        chosen: the experts of each token, (tokens, k).
        weights: g of each chosen expert, (tokens, k).
        replaced: (states, chosen, weights) -> the arguments and keyword arguments of the same call with these.
    """

    states: Tensor
    chosen: Tensor
    weights: Tensor
    replaced: Callable[[Tensor, Tensor, Tensor], tuple[tuple[Any, ...], dict[str, Any]]]

    def outputs(self, forward: Callable[..., Tensor]) -> Tensor:
        """Return f_j(x) of each token and each expert that was chosen for it, (tokens, k, hidden).

        Args:
            forward: the forward of the experts.
        """
        tokens, k = self.chosen.shape
        args, kwargs = self.replaced(
            self.states.repeat_interleave(k, 0), self.chosen.reshape(-1, 1), torch.ones_like(self.weights).view(-1, 1)
        )
        return forward(*args, **kwargs).view(tokens, k, -1)


def as_routed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routed | None:
    """Return a call of experts; None if its arguments are not those that are expected."""
    leaves, tree = tree_flatten((args, kwargs))
    tensors = {place: leaf for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    whole = [place for place, leaf in tensors.items() if not leaf.is_floating_point() and leaf.dtype != torch.bool]
    real = [place for place, leaf in tensors.items() if leaf.is_floating_point()]
    if len(tensors) != 3 or len(whole) != 1 or any(tensor.dim() != 2 for tensor in tensors.values()):
        return None
    (states, weights), (chosen,) = real, whole
    if tensors[weights].shape != tensors[chosen].shape:
        states, weights = weights, states
    if tensors[weights].shape != tensors[chosen].shape or len(tensors[states]) != len(tensors[chosen]):
        return None

    def replaced(*values: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        filled = list(leaves)
        for place, value in zip((states, chosen, weights), values, strict=True):
            filled[place] = value
        args, kwargs = tree_unflatten(filled, tree)
        return args, kwargs

    return Routed(tensors[states], tensors[chosen], tensors[weights], replaced)


@dataclass
class Seen:
    """What was seen of the experts of one mixture.

    Args:
        k: the largest number of experts that a token was sent to.
        hidden: number of features of an output.
    """

    k: int = 0
    hidden: int = 0


# A module that was run, and its inputs.
Input = tuple[nn.Module, dict[str, Any]]


def observed(
    model: nn.Module, sets: list[Experts], batches: list[dict[str, Any]]
) -> tuple[list[Input], dict[str, Seen]]:
    """Check on small inputs, and on the first of `batches`, that all calls of experts are as expected.

    Args:
        model: the model.
        sets: the mixtures.
        batches: model inputs.

    Returns:
        The inputs, and what was seen of each mixture by its name.

    Raises:
        ValueError: experts are not called with tokens, choices and weights; their output is not the weighted sum of
            their outputs; no input reaches a mixture.
    """
    seen: dict[str, Seen] = {}
    inputs: list[Input] = []
    # An error within a call would be taken for an input that the model does not take.
    wrong: dict[str, str] = {}

    def check(experts: Experts, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        known = seen.setdefault(experts.name, Seen())
        try:
            wrong[experts.name] = wrong.get(experts.name) or _unexpected(module, args, kwargs, output, known)
        except Exception as error:
            wrong[experts.name] = f"calls with one expert for each token, which fail with {type(error).__name__}"

    missing = list(sets)
    with contextlib.ExitStack() as hooks:
        for experts in sets:
            hook = experts.module.register_forward_hook(partial(check, experts), with_kwargs=True)
            hooks.callback(hook.remove)
        for part, batch in inputs_that_run(model, batches, missing, always=True):
            batch = without_router_loss(part, batch)
            trace_of(model, part, batch)
            inputs.append((part, batch))
            missing[:] = [experts for experts in missing if experts.name not in seen]
    for name, expected in wrong.items():
        if expected:
            raise ValueError(f"The experts of {name!r} cannot be removed: expected {expected}. {_ADVICE}")
    if missing:
        raise ValueError(
            f"No input reaches the experts of {missing[0].name!r}, so it cannot be shown that they may be removed. "
            "Pass `calibration` with model inputs that run this block, or leave it out with `exclude_modules`."
        )
    return inputs, seen


def without_router_loss(module: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Return model inputs with which `module` does not compute the loss of its routers.

    This loss depends on the number of experts, and it needs all blocks to run.
    """
    takes_it = "output_router_logits" in inspect.signature(module.forward).parameters
    return batch | ({"output_router_logits": False} if takes_it else {})


def _unexpected(module: nn.Module, args: Any, kwargs: Any, output: Any, seen: Seen) -> str:
    """Return what was expected of a call of experts and is not so, or "". Note the sizes of the call in `seen`."""
    routed = as_routed(args, kwargs)
    if routed is None or not isinstance(output, Tensor) or output.shape != routed.states.shape:
        return (
            "that they are called with states (tokens, hidden), the chosen experts (tokens, k) and their weights "
            f"(tokens, k), got {_shapes(args, kwargs)}"
        )
    outputs = routed.outputs(module.forward)
    seen.k, seen.hidden = max(seen.k, routed.chosen.shape[1]), outputs.shape[-1]
    summed = (outputs.float() * routed.weights[..., None].float()).sum(1)
    if is_close(output, summed.to(output.dtype)):
        return ""
    return (
        "that their output is the sum of the outputs of the chosen experts times the router's weights, but it is "
        "something else"
    )


_ADVICE = "Leave them out with `exclude_modules`, or call `prune`, which writes zeros into each expert."


def _shapes(args: Any, kwargs: Any) -> str:
    leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    return ", ".join(f"{leaf.dtype} {tuple(leaf.shape)}" for leaf in leaves) or "no tensors"


class Removal:
    """Checks that a model without some experts computes what the whole model computes without their choice.

    Args:
        model: the whole model. It is run on `inputs`.
        inputs: inputs that reach all experts, from `observed`.
        kept: (mixture, mask (count,) of the experts that stay).
        novices: the constants that take the place of removed experts, (removed, hidden), by the name of the mixture.
            A mixture without an entry loses its experts: the router must choose among the others.

    Raises:
        ValueError: the router chooses an expert whose logit is -inf.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: list[Input],
        kept: list[tuple[Experts, Tensor]],
        novices: Mapping[str, Tensor],
    ) -> None:
        self.model = model
        # An error of the experts is larger in what they return than in the states to which it is added.
        self.modules = find_blocks(model) | {experts.around[0]: experts.around[1] for experts, _ in kept}
        with contextlib.ExitStack() as undo:
            for experts, mask in kept:
                if experts.name in novices:
                    hook = partial(_with_constants, mask, novices[experts.name])
                    undo.callback(experts.module.register_forward_hook(hook, with_kwargs=True).remove)
                elif not mask.all():
                    undo.enter_context(_excluding(experts, mask))
            self.runs: list[Run] = [(part, batch, self._traced(part, batch)) for part, batch in inputs]

    def check(self) -> None:
        """Run the model without the experts.

        Raises:
            ValueError: a block returns something else than before, or does not run any more.
        """
        check_same(self.model, self.runs, _said, self.modules)

    def _traced(self, part: nn.Module, batch: dict[str, Any]) -> Trace:
        return trace_of(self.model, part, batch, modules=self.modules)


def _said(block: str, what: str) -> str:
    return (
        "Expected the model without the removed experts to compute what the whole model does when its router cannot "
        f"choose them, but {block or 'the model'!r} {what}. The number of experts or of their groups is also used "
        "elsewhere. The model is as it was before: leave this block out with `exclude_modules`, or call `prune`, "
        "which writes zeros into each expert."
    )


def _with_constants(
    kept: Tensor, novices: Tensor, module: nn.Module, args: Any, kwargs: Any, output: Tensor
) -> Tensor:
    """Return `output` of experts with constants in the place of the outputs of those that are False in `kept`."""
    routed = as_routed(args, kwargs)
    assert routed is not None, "`observed` checked the calls"
    gone = ~kept.to(output.device)
    constants = output.new_zeros(len(kept), novices.shape[1])
    constants[gone] = novices.to(output)
    change = constants[routed.chosen] - routed.outputs(module.forward)
    return output + (change * (routed.weights * gone[routed.chosen])[..., None]).sum(1).to(output.dtype)


@contextlib.contextmanager
def _excluding(experts: Experts, kept: Tensor) -> Iterator[None]:
    """Within the context the router cannot choose the experts that are False in `kept`: their logits are -inf."""
    gone = (~kept).nonzero().flatten()

    def check(module: nn.Module, args: Any, kwargs: Any) -> None:
        routed = as_routed(args, kwargs)
        assert routed is not None, "`observed` checked the calls"
        if not bool(kept.to(routed.chosen.device)[routed.chosen].all()):
            raise ValueError(
                f"The experts of {experts.name!r} cannot be removed: expected that the router chooses no expert whose "
                "logit and bias are -inf, but it does. Use a smaller `ratio`, leave them out with `exclude_modules`, "
                "or call `prune`, which writes zeros into each expert."
            )

    with contextlib.ExitStack() as undo:
        undo.callback(experts.module.register_forward_pre_hook(check, with_kwargs=True).remove)
        for router in experts.routers.values():
            own = router.__dict__.get("forward")
            undo.callback(_restore, router, own)
            cast_router: Any = router
            cast_router.forward = partial(_without, experts.count, gone, router.forward)
        for module, name, dim in experts.chosen_by():
            bias: Tensor = getattr(module, name)
            # Matrices of the router are reached by its logits.
            if bias.numel() == experts.count and bias.is_floating_point():
                before = bias.detach().clone()
                undo.callback(bias.detach().copy_, before)
                bias.detach().index_fill_(dim, gone.to(bias.device), -torch.inf)
        yield


def _restore(router: Any, own: Any) -> None:
    if own is None:
        del router.forward
    else:
        router.forward = own


def _without(count: int, gone: Tensor, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _Logits(count, gone):
        return forward(*args, **kwargs)


class _Logits(TorchFunctionMode):
    """Replaces the logits of experts by -inf, in products that have one output per expert."""

    def __init__(self, count: int, gone: Tensor) -> None:
        super().__init__()
        self.count, self.gone = count, gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and output.shape[-1] == self.count:
            return output.index_fill(-1, self.gone.to(output.device), -torch.inf)
        return output


_PRODUCTS = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
