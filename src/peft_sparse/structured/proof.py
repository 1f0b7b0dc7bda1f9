"""Proves on a small input what structured pruning assumes of a model, before anything is changed for good.

`prove_units` shows that heads and neurons can be removed one by one: a head whose columns of the output projection
are zero must not be seen by the others, whether its own rows are zero or not. `SameOutputs` shows that a model
computes the same after it was changed.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..calibration.inputs import evaluation_mode, model_arguments
from ..model.blocks import base_model, find_blocks
from .examples import example_inputs
from .units import Units


# A run of a model: (name of a block, a tensor that it returned) in the order in which blocks ran; "" for the model.
Trace = list[tuple[str, Tensor]]
# (the model or a model inside it, inputs that it takes, what it returned).
Run = tuple[nn.Module, dict[str, Any], Trace]


def prove_units(model: nn.Module, sets: list[Units], batches: list[dict[str, Any]]) -> None:
    """Check that units of `sets` can be removed without a change of what the others compute. No weight is changed.

    The model is run twice on a small input. Every second unit is removed: in the first run from the inputs of the
    output layers alone, in the second also from the outputs of the layers before them. Every block must return the
    same.

    Args:
        model: the model.
        sets: the units.
        batches: model inputs for what the inputs that this function makes do not reach.

    Raises:
        ValueError: a block returns something else; no input reaches a layer of `sets`.
    """
    open_sets = [units for units in sets if units.count > 1]
    for part, batch in inputs_that_run(model, batches, open_sets):
        called: set[str] = set()
        with _removing(open_sets, called, rows=False):
            columns_only = trace_of(model, part, batch)
        with _removing(open_sets, called, rows=True):
            everything = trace_of(model, part, batch)
        block = first_difference(columns_only, everything)
        if block is not None:
            raise ValueError(
                f"Expected heads and neurons that do not see each other, but in {block or 'the model'!r} the others "
                "compute something else after some of them were removed. The reason may be a norm over all of them, a "
                "layer that mixes them, or a layer that is used elsewhere too. Leave the attention or the MLP of this "
                "block out with `exclude_modules`, or call `prune`, which needs no heads or neurons."
            )
        open_sets[:] = [units for units in open_sets if not units.named_layers().keys() <= called]
    if open_sets:
        raise ValueError(_unreached(open_sets[0]))


class SameOutputs:
    """Checks that a model computes the same before and after a change.

    Args:
        model: the model before the change. It is run on small inputs.
        sets: the units that are about to change. An input must reach all of their layers.
        batches: model inputs for what the inputs that this class makes do not reach.

    Raises:
        ValueError: no input reaches a layer of `sets`.
    """

    def __init__(self, model: nn.Module, sets: list[Units], batches: list[dict[str, Any]]) -> None:
        self.model = model
        self.runs: list[Run] = []
        missing = list(sets)
        for part, batch in inputs_that_run(model, batches, missing):
            called: set[str] = set()
            with _removing(missing, called, rows=False, keep_all=True):
                self.runs.append((part, batch, trace_of(model, part, batch)))
            missing[:] = [units for units in missing if not units.named_layers().keys() <= called]
        if missing:
            raise ValueError(_unreached(missing[0]))

    def check(self) -> None:
        """Run the changed model.

        Raises:
            ValueError: a block returns something else than before, or does not run any more.
        """
        check_same(self.model, self.runs, self._said)

    def _said(self, block: str, what: str) -> str:
        return (
            f"Expected the compact model to compute what the masked one does, but {block or 'the model'!r} {what}. "
            "Its sizes are also used where they were not changed. The model is as it was before: use it with its "
            "zeros, or remove nothing from this block, with `exclude_modules` of `prune_structured`."
        )


def check_same(
    model: nn.Module, runs: list[Run], said: Callable[[str, str], str], modules: dict[str, nn.Module] | None = None
) -> None:
    """Run a changed model on the inputs of `runs`.

    Args:
        model: the model.
        runs: what it computed before.
        said: (name of a block, what it does) -> the error message.
        modules: the modules that are compared, by name; by default the blocks.

    Raises:
        ValueError: a block returns something else than before, or does not run any more.
    """
    for part, batch, before in runs:
        after: Trace = []
        try:
            trace_of(model, part, batch, after, modules)
        except Exception as error:
            done = len(after)
            block = before[min(done, len(before) - 1)][0]
            # Assertions often have no text.
            text = str(error).strip().rstrip(".")
            failure = f"{type(error).__name__}: {text}" if text else type(error).__name__
            raise ValueError(said(block, f"fails with {failure}")) from error
        block_or_none = first_difference(before, after)
        if block_or_none is not None:
            raise ValueError(said(block_or_none, "computes something else"))


def first_difference(before: Trace, after: Trace) -> str | None:
    """Return the name of the first block whose outputs differ by more than rounding; None if there is none."""
    for (name, one), (other_name, other) in zip(before, after, strict=False):
        if name != other_name or not is_close(one, other):
            return name
    return None if len(before) == len(after) else (before, after)[len(before) < len(after)][-1][0]


def is_close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    exact = one.dtype in (torch.float32, torch.float64)
    finite = torch.isfinite(one) & torch.isfinite(other)
    if not torch.equal(one[~finite].nan_to_num(), other[~finite].nan_to_num()):
        return False
    one, other = (tensor.float().masked_fill(~finite, 0) for tensor in (one, other))
    if exact or one.dim() < 2:
        return bool((one - other).norm() <= (1e-4 if exact else 0.05) * one.norm())
    # In half precision rounding may send a token to another expert. What is wrong is wrong for most tokens.
    errors = (one - other).flatten(0, -2).norm(dim=1) / one.flatten(0, -2).norm(dim=1).clamp_min(1e-6)
    return bool(errors.median() <= 0.05)


class Reached(Protocol):
    """What an input reaches if it runs the module `output`."""

    @property
    def output(self) -> nn.Module: ...


def inputs_that_run(
    model: nn.Module, batches: list[dict[str, Any]], missing: Sequence[Reached], always: bool = False
) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Yield (module, inputs that it takes) for the whole model, and for the models inside it.

    The inputs are made for the module. If something is still missing after those of the whole model, the first of
    `batches` follows.

    Args:
        model: the model.
        batches: model inputs of the caller.
        missing: units or experts that no input has reached yet. The caller takes out those that it has seen.
        always: yield the first of `batches` also if nothing is missing.
    """
    inner = base_model(model)
    models = [module for module in inner.modules() if isinstance(module, PreTrainedModel) and module is not inner]
    for part in (inner, *models):
        for batch in example_inputs(part):
            if _holds_any(part, missing) and _runs(model, part, batch):
                yield part, batch
        for batch in batches[:1] if part is inner and (missing or always) else ():
            yield inner, model_arguments(model, batch)


def _runs(model: nn.Module, part: nn.Module, batch: dict[str, Any]) -> bool:
    try:
        trace_of(model, part, batch)
    except Exception:
        # Whether a model takes an input is only known by trying.
        return False
    return True


def _holds_any(module: nn.Module, sets: Sequence[Reached]) -> bool:
    outputs = {id(units.output) for units in sets}
    return any(id(below) in outputs for below in module.modules())


@torch.no_grad()
def trace_of(
    model: nn.Module,
    part: nn.Module,
    batch: dict[str, Any],
    trace: Trace | None = None,
    modules: dict[str, nn.Module] | None = None,
) -> Trace:
    """Run `part` of `model`, and return what the blocks, or other `modules`, and `part` itself returned."""
    noted: Trace = [] if trace is None else trace

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        noted.extend((name, tensor.detach().cpu().clone()) for tensor in tensors[:1])

    device = next((p.device for p in part.parameters() if not p.is_meta), torch.device("cpu"))
    with contextlib.ExitStack() as hooks:
        for name, block in (find_blocks(model) if modules is None else modules).items():
            hooks.callback(block.register_forward_hook(partial(note, name)).remove)
        hooks.enter_context(evaluation_mode(model))
        output = part(**send_to_device(batch, device))
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    note("", model, (), values)
    return noted


@contextlib.contextmanager
def _removing(sets: Iterable[Units], called: set[str], *, rows: bool, keep_all: bool = False) -> Iterator[None]:
    """Remove every second unit of `sets` from what its layers receive and return, and note the layers that run.

    Args:
        sets: the units.
        called: gets the names of the layers that run.
        rows: whether the layers before the output layer return zeros for the units. Their columns are always removed.
        keep_all: remove nothing.
    """

    def receive(name: str, gone: Tensor, module: nn.Module, args: Any, kwargs: Any) -> Any:
        called.add(name)
        return (_without(gone, args[0]), *args[1:]), kwargs

    def give(name: str, gone: Tensor, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        called.add(name)
        return _without(gone, output) if rows else output

    with contextlib.ExitStack() as hooks:
        for units in sets:
            kept = torch.ones(units.count, dtype=torch.bool, device="cpu")
            kept[1::2] = keep_all
            columns = (~units.columns_of(kept)).nonzero().flatten()
            hook: Callable[..., Any] = partial(receive, units.output_name, columns)
            hooks.callback(units.output.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for name, layer in units.rows.items():
                lost = (~units.rows_of(layer, kept)).nonzero().flatten()
                hooks.callback(layer.register_forward_hook(partial(give, name, lost)).remove)
        yield


def _without(gone: Tensor, values: Tensor) -> Tensor:
    return values.index_fill(-1, gone.to(values.device), 0) if len(gone) else values


def _unreached(units: Units) -> str:
    return (
        f"No input reaches all layers of {units.name!r}, so it cannot be shown that its heads or neurons may be "
        "removed. Pass `calibration` with model inputs that the model takes and that run this block, or leave it out "
        "with `exclude_modules` of `prune_structured`."
    )
