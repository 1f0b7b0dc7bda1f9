"""Where a block computes: on the device of its weights, which may be another one than that of its caller."""

import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import base_model, find_blocks
from ..model.environment import check_device
from ..model.offload import execution_device, has_hooks, resident_through_hooks
from .inputs import model_arguments
from .recording import Returned, give_back, leaves_of, map_leaves, returned_by


Residence = Callable[[str, nn.Module], AbstractContextManager[Any]]


def on_device(device: torch.device | str | None) -> Residence:
    """Return a residence that moves a block to `device` and back. With None, the block stays where it is.

    Weights that accelerate has offloaded are loaded within it, and what was written into them is kept.
    """

    # Not accelerate's `align_module_device`: it moves the parameters of one module, but no children and no buffers.
    @contextlib.contextmanager
    def resident(name: str, block: nn.Module) -> Iterator[None]:
        if has_hooks(block):
            with resident_through_hooks(block, device):
                yield
            return
        homes = {tensor.device for tensor in (*block.parameters(), *block.buffers())}
        if device is None or homes <= {torch.device(device)}:
            yield
            return
        if len(homes) > 1:
            with resident_through_hooks(block, device):
                yield
            return
        try:
            block.to(device)
        except (AssertionError, RuntimeError):
            check_device(device)
            raise
        try:
            yield
        finally:
            block.to(homes.pop())

    return resident


@contextlib.contextmanager
def staying(residence: Residence) -> Iterator[Residence]:
    """Return a residence in which a block stays until another one is needed, and at most to the end of the context.

    A block that runs on one batch after the other is moved once.
    """
    there: list[nn.Module] = []
    running = 0
    with contextlib.ExitStack() as stay:

        @contextlib.contextmanager
        def resident(name: str, block: nn.Module) -> Iterator[None]:
            nonlocal running
            known = there == [block]
            if running and not known:
                # A block that is called within another one, which has to stay.
                with residence(name, block):
                    yield
                return
            if not known:
                there.clear()
                stay.close()
                stay.enter_context(residence(name, block))
                there.append(block)
            running += 1
            try:
                yield
            finally:
                running -= 1

        yield resident


def restore_forward(block: nn.Module, own: Any) -> None:
    """Undo a replacement of `block.forward`: `own` is the attribute that the block had, None if it had none."""
    if own is None:
        del block.forward
    else:
        block.forward = own


def to_device(device: torch.device, leaf: Any) -> Any:
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf


def with_tensors(returned: Returned, replaced: dict[int, Tensor]) -> Returned:
    """Return what a block returned, with other tensors by the ids of those they replace."""
    tree = map_leaves(lambda leaf: replaced.get(id(leaf), leaf), returned.tree)
    return Returned(tree, [replaced.get(id(tensor), tensor) for tensor in returned.tensors])


def run_there(
    block: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Returned:
    """Run `forward` of `block` on the device of its weights, and return what it returned.

    What it returns comes back to the device of the first tensor among the arguments.
    """
    home = next((leaf.device for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor)), None)
    device = next((p.device for p in block.parameters()), home)
    if device is None or home is None or device == home:
        return returned_by(forward, args, kwargs)
    own = args, kwargs
    there = map_leaves(partial(to_device, device), own)
    returned = returned_by(forward, *there)
    moved = {id(tensor): tensor.to(home) for tensor in returned.tensors}
    give_back(there, own, lambda leaf: moved.get(id(leaf), leaf))
    return with_tensors(returned, moved)


def arguments_there(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with which `model` is called on a batch to run its blocks, on the device that takes them.

    What the model makes of the states after its last block is not asked for. Without labels, a language model
    therefore computes the logits of the last token alone, which saves the largest tensor of the pass.
    """
    given = model_arguments(model, batch)
    if given.get("labels") is None and "logits_to_keep" in inspect.signature(base_model(model).forward).parameters:
        given = {"logits_to_keep": 1} | given
    arguments: dict[str, Any] = map_leaves(partial(to_device, execution_device(model)), given)
    return arguments


def in_residence(
    residence: Residence, name: str, block: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """Run `forward` of a block where its residence puts it."""
    with residence(name, block):
        return run_there(block, forward, args, kwargs).tree


def run_in_residence(model: nn.Module, batch: Mapping[str, Any], residence: Residence) -> None:
    """Run `model` on a batch, each block within its residence."""
    with contextlib.ExitStack() as undo:
        for name, block in find_blocks(model).items():
            undo.callback(restore_forward, block, block.__dict__.get("forward"))
            block.forward = partial(in_residence, residence, name, block, block.forward)
        model(**arguments_there(model, batch))


def check_runs(
    model: nn.Module, inputs: Sequence[Mapping[str, Any]], number: int, residence: Residence, raised: Exception
) -> None:
    """Check that `model` runs on batch `number` of `inputs` as it is. `raised` is why this is asked.

    Raises:
        ValueError: it does not.
    """
    if _is_own(raised):
        return
    batch = inputs[number]
    try:
        with torch.no_grad():
            run_in_residence(model, batch, residence)
    except Exception as error:
        if "meta" not in str(error):
            if (refusal := _refusal(model, batch, f"batch {number} of the calibration data", error)) is not None:
                raise refusal from error
            return
        # Weights that are not loaded. Those of a checkpoint are loaded by one who says what to do.
        if has_hooks(model):
            raise ValueError(
                f"{type(base_model(model)).__name__} uses weights that accelerate has offloaded, outside of calls of "
                "the modules that hold them, as `torch.nn.MultiheadAttention` does. Offload the model with the class "
                "of the module that uses them in `preload_module_classes`."
            ) from error


# What models raise for a batch that does not fit.
_UNFIT = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def running(model: nn.Module, batch: Mapping[str, Any], name: str) -> Iterator[None]:
    """Run `model` within the context on a batch. If it does not fit, the error calls it `name`.

    Raises:
        ValueError: the model does not run on the batch.
    """
    try:
        yield
    except Exception as error:
        if (refusal := _refusal(model, batch, name, error)) is not None:
            raise refusal from error
        raise


def _refusal(model: nn.Module, batch: Mapping[str, Any], name: str, error: Exception) -> ValueError | None:
    """Return the error that says that `model` does not run on the batch called `name`.

    None if `error` says what it is: one of this package, or of another class than those in which a batch ends that
    does not fit, such as that of a full GPU.
    """
    if _is_own(error) or type(error) not in _UNFIT:
        return None
    given = {key: tuple(value.shape) for key, value in batch.items() if isinstance(value, Tensor)}
    return ValueError(
        f"{type(base_model(model)).__name__} does not run on {name}, with tensors of the shapes {given}. Give what "
        "`model(**batch)` takes, and no longer sequences than the model reads. It raised "
        f"{type(error).__name__}: {error}"
    )


def _is_own(error: Exception) -> bool:
    """Return whether code of this package raised `error`."""
    frame = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    return bool(frame.f_globals["__name__"].partition(".")[0] == __name__.partition(".")[0])
