"""Runs a model block by block on calibration batches and measures the inputs of its layers.

Decides nothing and changes no weight. Memory: one hidden state per batch, the arguments the model passes its blocks,
and whatever one block needs.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import base_model


Calibration = Tensor | Iterable[Mapping[str, Any]]


@dataclass
class InputNorm:
    """Running ||X_j||_2 of the inputs of one layer over all tokens that are not padding."""

    sum_of_squares: Tensor | float = 0.0
    tokens: int = 0

    def update(self, inputs: Tensor, keep: Tensor | None) -> None:
        """Add `inputs` (..., in); `keep` (...) is False at padding."""
        rows = inputs[keep] if keep is not None and keep.shape == inputs.shape[:-1] else inputs.flatten(0, -2)
        dtype = torch.promote_types(rows.dtype, torch.float32)
        self.sum_of_squares += torch.linalg.vector_norm(rows, dim=0, dtype=dtype).square()
        self.tokens += rows.shape[0]

    def value(self) -> Tensor:
        """Return ||X_j||_2, shape (in,), float32."""
        assert isinstance(self.sum_of_squares, Tensor), "no inputs were seen"
        return self.sum_of_squares.sqrt()


@dataclass
class _Call:
    """How the model calls one block on one batch, the hidden states left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class _Batch:
    hidden: Tensor
    keep: Tensor | None
    calls: list[_Call] = field(default_factory=list)


class _CaptureComplete(Exception):
    """Raised by the last block's stand-in: nothing after it is needed. Private, so that no model error is caught."""


class BlockRunner:
    """The blocks of a model, and the calibration batches on their way through them.

    Take the blocks in order: `measure(i, ...)` as often as needed, then `advance(i)` once, after block i was pruned.

    Raises:
        ValueError: the calibration data are not token ids or model inputs, or the blocks form more than one stack.
    """

    def __init__(self, model: nn.Module, blocks: dict[str, nn.Module], calibration: Calibration) -> None:
        stacks = {name.rpartition(".")[0] for name in blocks}
        if len(stacks) > 1:
            raise ValueError(
                f"Calibration runs one stack of blocks, this model has {len(stacks)}: {', '.join(sorted(stacks))}. "
                "Use "
                'a criterion without calibration, such as "magnitude".'
            )
        self.blocks = list(blocks.values())
        self.batches = _capture(model, self.blocks, _as_inputs(calibration))

    @torch.no_grad()
    def measure(self, index: int, before_batch: Callable[[_Batch], None]) -> None:
        """Run block `index` on every batch for its hooks' sake; the batches stay before the block."""
        for batch in self.batches:
            before_batch(batch)
            self._run(index, batch)

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Replace the hidden states of every batch by what block `index` makes of them."""
        for batch in self.batches:
            batch.hidden = self._run(index, batch)

    def _run(self, index: int, batch: _Batch) -> Tensor:
        call = batch.calls[index]
        output = self.blocks[index](batch.hidden, *call.args, **call.kwargs)
        return output if isinstance(output, Tensor) else output[0]


def input_norms(runner: BlockRunner, index: int, layers: dict[str, nn.Module]) -> dict[str, InputNorm]:
    """Run block `index` of `runner` and return the input norms of `layers`, which lie inside it, by name.

    Raises:
        ValueError: a layer received no input, or inputs that are not finite.
    """
    if not layers:
        return {}
    norms = {name: InputNorm() for name in layers}
    keep: Tensor | None = None

    def next_batch(batch: _Batch) -> None:
        nonlocal keep
        keep = batch.keep

    def hook(norm: InputNorm) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: norm.update(args[0], keep)

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(hook(norms[name])).remove)
        runner.measure(index, next_batch)
    for name, norm in norms.items():
        if norm.tokens == 0:
            raise ValueError(
                f"Layer {name!r} saw no calibration token, so its inputs cannot be measured. Use more calibration "
                "sequences, or add it to `exclude_modules`."
            )
    finite = torch.stack([norm.value().isfinite().all().cpu() for norm in norms.values()]).tolist()
    if not all(finite):
        raise ValueError(
            f"Expected finite inputs, but those of layer {list(norms)[finite.index(False)]!r} hold NaN or infinity. "
            "Check the calibration data, or run the model in float32 or bfloat16."
        )
    return norms


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off within the context, and put every module back into its own mode after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _as_inputs(calibration: Calibration) -> list[dict[str, Any]]:
    if isinstance(calibration, Tensor):
        if calibration.dim() != 2 or calibration.dtype not in (torch.int32, torch.int64) or 0 in calibration.shape:
            raise ValueError(
                "Expected `calibration` as token ids, a LongTensor (sequences, tokens), got "
                f"{calibration.dtype} of shape {tuple(calibration.shape)}."
            )
        return [{"input_ids": row} for row in calibration.split(1)]
    batches = [dict(batch) for batch in calibration]
    if not batches:
        raise ValueError("`calibration` holds no batch. Give at least one sequence.")
    for batch in batches:
        batch.pop("labels", None)
    return batches


@torch.no_grad()
def _capture(model: nn.Module, blocks: list[nn.Module], inputs: list[dict[str, Any]]) -> list[_Batch]:
    """Run everything before and between the blocks; return what the first is fed, and how each one is called.

    The blocks of the first batch run for real, which shows what they return; from then on identities stand in for them
    wherever only the hidden states come out. A block that hands on more (T5 hands on its position bias) always runs.
    """
    device = next(model.parameters()).device
    extra = {"use_cache": False} if "use_cache" in inspect.signature(base_model(model).forward).parameters else {}
    identities: dict[int, bool] = {}
    captured: list[_Batch] = []

    def stand_in(index: int, run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            if index == 0:
                captured.append(_Batch(hidden, keep))
            captured[-1].calls.append(_Call(args, kwargs))
            if index == len(blocks) - 1:
                raise _CaptureComplete
            if identities.get(index):
                return hidden
            output = run(hidden, *args, **kwargs)
            identities[index] = isinstance(output, Tensor)
            return output

        return forward

    with contextlib.ExitStack() as replaced:
        for index, block in enumerate(blocks):
            run = block.forward
            replaced.callback(_restore_forward, block, block.__dict__.get("forward"))
            block.forward = stand_in(index, run)
        for batch in inputs:
            batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            keep = _kept_tokens(batch)
            with contextlib.suppress(_CaptureComplete):
                model(**batch, **extra)
    return captured


def _restore_forward(block: nn.Module, own: Any) -> None:
    if own is None:
        del block.forward
    else:
        block.forward = own


def _kept_tokens(batch: dict[str, Any]) -> Tensor | None:
    padding_mask = batch.get("attention_mask")
    return padding_mask.bool() if isinstance(padding_mask, Tensor) and padding_mask.dim() == 2 else None
