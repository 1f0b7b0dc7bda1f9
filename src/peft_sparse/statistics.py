"""Measures what criteria need to know of a block's weights, while a `BlockRunner` runs it on calibration data.

Inputs that several weights share, such as those of the query, key and value projections, are measured once.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import PreTrainedModel

from .blocks import base_model, called_layers
from .calibration import Batch, BlockRunner, Call
from .criteria import Need, Statistics
from .weights import WeightView, input_rows


# Rows of X that a relative output error is estimated on.
SAMPLED_TOKENS = 1024


def sampled_per_batch(batches: int) -> int:
    """Return how many rows of X are kept of each batch; of a batch with fewer, all are."""
    return -(-SAMPLED_TOKENS // batches)


@dataclass
class InputStatistics:
    """Running statistics of one input X (tokens, in), in float32 or wider."""

    hessian_wanted: bool = False
    rows_per_batch: int = SAMPLED_TOKENS
    moments_wanted: bool = False
    norm_squared: Tensor | None = None
    total: Tensor | None = None
    hessian: Tensor | None = None
    sampled: list[Tensor] = field(default_factory=list)
    tokens: int = 0

    def update(self, rows: Tensor) -> None:
        """Add `rows` (tokens, in)."""
        dtype = torch.promote_types(rows.dtype, torch.float32)
        count = len(rows)
        kept = min(count, self.rows_per_batch)
        self.sampled.append(rows[torch.arange(kept, device=rows.device) * count // max(kept, 1)])
        self.tokens += count
        if self.moments_wanted:
            # Wide, because the variance is a difference of large numbers where the mean is far from zero.
            total = rows.sum(0, dtype=torch.float64)
            self.total = total if self.total is None else self.total.add_(total)
        if self.hessian_wanted:
            rows = rows.to(dtype)
            if self.hessian is None:
                self.hessian = torch.zeros(rows.shape[1], rows.shape[1], dtype=dtype, device=rows.device)
            _add_upper_gram(self.hessian, rows)
        else:
            squared = torch.linalg.vector_norm(rows, dim=0, dtype=dtype).square_()
            self.norm_squared = squared if self.norm_squared is None else self.norm_squared.add_(squared)

    def finish(self) -> None:
        """Complete the Hessian, of which only the part above the diagonal is summed."""
        if self.hessian is not None:
            self.norm_squared = self.hessian.diagonal().clone()
            _mirror(self.hessian)

    @property
    def input_norm(self) -> Tensor:
        """||X_j||_2, (in,)."""
        assert self.norm_squared is not None, "no inputs were seen"
        return self.norm_squared.sqrt()

    @property
    def mean(self) -> Tensor | None:
        """Mean of X_j, (in,); None if it was not wanted."""
        return None if self.total is None else (self.total / self.tokens).to(self.input_norm.dtype)

    @property
    def variance(self) -> Tensor | None:
        """Variance of X_j around its mean, (in,); None if it was not wanted."""
        if self.total is None or self.norm_squared is None:
            return None
        squares = self.norm_squared.double() / self.tokens
        return (squares - (self.total / self.tokens).square()).clamp_min_(0).to(self.norm_squared.dtype)


@dataclass
class BlockStatistics:
    """The statistics of one block's weights; `inputs` maps a weight's name to those of its inputs, as they came."""

    inputs: dict[str, InputStatistics]

    def of(self, name: str, gradient: Tensor | None = None, sequences: int = 0) -> Statistics:
        """Return what a criterion may know of the weight called `name`."""
        measured = self.inputs[name]
        return Statistics(
            measured.input_norm,
            measured.hessian,
            gradient,
            measured.tokens,
            sequences,
            measured.mean,
            measured.variance,
        )

    def sample(self, name: str) -> Tensor:
        """Return some rows of X of the weight called `name`, (rows, in)."""
        return torch.cat(self.inputs[name].sampled)


def measure(
    model: nn.Module, runner: BlockRunner, index: int, weights: dict[str, WeightView], needs: tuple[Need, ...]
) -> BlockStatistics:
    """Run block `index` of `runner` and return the statistics of the inputs of `weights`, which lie inside it.

    Raises:
        ValueError: as `measure_inputs`.
    """
    return measure_inputs(model, weights, needs, len(runner.batches), partial(runner.run, index))


def measure_inputs(
    model: nn.Module,
    weights: dict[str, WeightView],
    needs: tuple[Need, ...],
    batches: int,
    run: Callable[[Callable[[Batch, Call], None]], None],
) -> BlockStatistics:
    """Return the statistics of the inputs that `weights` get while `run(before_batch)` runs all batches.

    Raises:
        ValueError: a weight received no input, inputs that are all zero, or inputs that are not finite.
    """
    leaders: dict[str, str] = {}
    measured: dict[str, InputStatistics] = {}
    quota = sampled_per_batch(batches)

    def record(name: str, leader: str, rows: Callable[[], Tensor]) -> None:
        known = leaders.setdefault(name, leader)
        if known != leader:
            raise RuntimeError(
                f"Expected the inputs of {name!r} to be those of {known!r} on every batch, got those of {leader!r}. "
                "Prune these layers in separate calls with `target_modules`."
            )
        if name == leader:
            if name not in measured:
                measured[name] = InputStatistics("hessian" in needs, quota, "moments" in needs)
            measured[name].update(rows())

    with observed(model, weights, record) as before_batch:
        run(before_batch)
    for statistics in measured.values():
        statistics.finish()
    _check(weights, leaders, measured)
    # In the order in which the inputs came, those with shared inputs together.
    return BlockStatistics({n: measured[leader] for leader in measured for n in weights if leaders[n] == leader})


def relative_error(before: Tensor, after: Tensor) -> Tensor:
    """Return ||(W - W')X|| / ||WX|| from the outputs WX and W'X, as a scalar on their device; 0 where WX is 0."""
    scale = before.norm()
    return torch.where(scale > 0, (before - after).norm() / scale, scale)


def gradient_sums(
    model: nn.Module, weights: dict[str, WeightView], inputs: list[dict[str, Any]], offload: bool = False
) -> dict[str, Tensor]:
    """Return Σ_n |∂L_n/∂W| for every weight, over calibration sequences n, as float32 matrices (out, in).

    L is the model's own loss, for a causal language model that of its inputs as labels. A gradient is added up and
    freed as soon as it is there, so that beside the sums, 4 bytes per weight, no more than one is held. In float16 the
    loss is scaled up, so that small gradients do not vanish.

    Args:
        inputs: model inputs; batches are taken apart, since n counts sequences.
        offload: keep the sums in CPU memory.

    Raises:
        ValueError: the model returns no loss, or a gradient that is not finite.
    """
    sums: dict[str, Tensor] = {}
    parameters = {id(weight.storage): weight.storage for weight in weights.values()}
    device = next(model.parameters()).device
    scale = 1024.0 if any(p.dtype == torch.float16 for p in parameters.values()) else 1.0

    def add(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        for name, weight in by_parameter[id(parameter)]:
            size = weight.matrix_of(gradient).abs().float().div_(scale)
            size = size.cpu() if offload else size
            sums[name] = sums[name].add_(size) if name in sums else size

    by_parameter: dict[int, list[tuple[str, WeightView]]] = {key: [] for key in parameters}
    for name, weight in weights.items():
        by_parameter[id(weight.storage)].append((name, weight))
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with contextlib.ExitStack() as undo, torch.enable_grad():
        for parameter, was in trainable:
            undo.callback(parameter.requires_grad_, was)
            parameter.requires_grad_(id(parameter) in parameters)
        for stored in parameters.values():
            undo.callback(setattr, stored, "grad", stored.grad)
            stored.grad = None
            undo.callback(stored.register_post_accumulate_grad_hook(add).remove)
        for batch in tqdm(_single_sequences(inputs), desc="gradients", unit="sequence", leave=False, disable=None):
            (_loss(model, send_to_device(batch, device)) * scale).backward()
    _check_gradients(weights, sums)
    return sums


def warn_of_few_tokens(name: str, statistics: Statistics) -> bool:
    """Warn if X has fewer rows than columns, which leaves XᵀX singular; tell whether a warning was given."""
    assert statistics.hessian is not None
    columns = statistics.hessian.shape[0]
    if statistics.tokens >= columns:
        return False
    warnings.warn(
        f"The Hessian of {name!r} has {columns} columns and was measured on {statistics.tokens} tokens: it is "
        f"singular, and only damping makes it solvable. Use at least {columns} tokens, better ten times as many.",
        stacklevel=2,
    )
    return True


@contextlib.contextmanager
def observed(
    model: nn.Module,
    weights: dict[str, WeightView],
    record: Callable[[str, str, Callable[[], Tensor]], None],
) -> Iterator[Callable[[Batch, Call], None]]:
    """Call `record(name, leader, rows)` for the inputs of each weight whenever its block runs.

    `leader` is the weight that was given the same inputs first, `name` itself if none was; `rows()` returns them as
    (tokens, in) without padding. Yields what `runner.run` calls before each batch.
    """
    batch: Batch
    contexts: list[Tensor] = []
    seen: list[tuple[Tensor, str]] = []

    def before_batch(next_batch: Batch, call: Call) -> None:
        nonlocal batch
        batch = next_batch
        contexts[:] = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
        seen.clear()

    def see(name: str, layer: nn.Module, inputs: Tensor) -> None:
        leader = next((other for known, other in seen if known is inputs), None)
        if leader is None:
            seen.append((inputs, name))
        keep = batch.keep_context if any(inputs is context for context in contexts) else batch.keep

        def rows() -> Tensor:
            found = input_rows(layer, inputs)
            # Some models flatten sequences and tokens; experts are given no padding.
            if name in experts or keep is None or keep.numel() != found.shape[0]:
                return found
            return found[keep.flatten().to(found.device)]

        record(name, leader or name, rows)

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: see(name, module, args[0])

    experts = {name: weight for name, weight in weights.items() if weight.expert is not None}
    expert_inputs = _ExpertInputs(experts, see)
    called = called_layers(model)
    with contextlib.ExitStack() as undo:
        for name, weight in weights.items():
            if weight.expert is None:
                layer = called.get(id(weight.layer), weight.layer)
                undo.callback(layer.register_forward_pre_hook(hook(name)).remove)
        for layer in {id(weight.layer): weight.layer for weight in experts.values()}.values():
            undo.callback(layer.register_forward_pre_hook(expert_inputs.locate).remove)
            undo.enter_context(_without_padding(layer, lambda: batch.keep))
        if experts:
            undo.enter_context(_eager_experts(model))
            undo.enter_context(expert_inputs)
        yield before_batch


@contextlib.contextmanager
def _without_padding(experts: nn.Module, keep: Callable[[], Tensor | None]) -> Iterator[None]:
    """Hand `experts` no padding: inside, tokens are sorted by expert, and padding cannot be told any more."""
    kept: Tensor | None = None

    def drop(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        nonlocal kept
        mask = keep()
        fits = mask is not None and mask.numel() == args[0].shape[0]
        kept = mask.flatten().to(args[0].device) if mask is not None and fits else None
        return None if kept is None else tuple(arg[kept] for arg in args)

    def refill(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if kept is None:
            return output
        filled = output.new_zeros(len(kept), *output.shape[1:])
        filled[kept] = output
        return filled

    hooks = [experts.register_forward_pre_hook(drop), experts.register_forward_hook(refill)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _ExpertInputs(TorchFunctionMode):
    """Sees the inputs of fused experts: whatever is multiplied by a slice of a parameter that holds them."""

    def __init__(self, experts: dict[str, WeightView], see: Callable[[str, nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.see = see
        self.layers: dict[int, dict[str, dict[int | None, str]]] = {}
        for name, weight in experts.items():
            self.layers.setdefault(id(weight.layer), {}).setdefault(weight.parameter, {})[weight.expert] = name
        self.located: dict[int, tuple[nn.Module, Tensor, dict[int | None, str]]] = {}

    def locate(self, layer: nn.Module, args: Any) -> None:
        """Find the parameters of `layer`, which is about to run: an adapter puts others in their place meanwhile."""
        for parameter, names in self.layers[id(layer)].items():
            stored = getattr(layer, parameter)
            self.located[stored.untyped_storage().data_ptr()] = layer, stored, names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor):
            found = self.located.get(args[1].untyped_storage().data_ptr())
            if found is not None:
                layer, stored, names = found
                expert = (args[1].storage_offset() - stored.storage_offset()) // stored.stride(0)
                if expert in names:
                    self.see(names[expert], layer, args[0])
        return func(*args, **(kwargs or {}))


_PRODUCTS = {nn.functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


@contextlib.contextmanager
def _eager_experts(model: nn.Module) -> Iterator[None]:
    """Have the experts multiplied one by one, not by one grouped kernel that shows no single expert's inputs."""
    inner = base_model(model)
    if not isinstance(inner, PreTrainedModel):
        yield
        return
    before = inner.get_experts_implementation()
    inner.set_experts_implementation("eager")
    try:
        yield
    finally:
        inner.set_experts_implementation(before)


def _single_sequences(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    singles = []
    for batch in inputs:
        size = next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))
        for i in range(size):
            singles.append({k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in batch.items()})
    return singles


def _loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    if "labels" not in batch and "input_ids" in batch:
        batch = {**batch, "labels": _labels(batch)}
    loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f'Criterion "gblm" needs a loss, and {type(base_model(model)).__name__} returned none. Give calibration '
            "batches with `labels`, or a model with a task head."
        )
    return loss


def _labels(batch: dict[str, Any]) -> Tensor:
    """Return the tokens themselves as labels, those aside that are padding or would be predicted from padding."""
    side = "decoder_" if "decoder_input_ids" in batch else ""
    labels, mask = batch[f"{side}input_ids"], batch.get(f"{side}attention_mask")
    if isinstance(mask, Tensor):
        predicted = mask.bool()
        predicted[:, 1:] &= predicted[:, :-1].clone()
        labels = labels.masked_fill(~predicted, -100)
    # Decoders alone shift their labels; those behind an encoder expect what follows each token.
    return nn.functional.pad(labels[:, 1:], (0, 1), value=-100) if side else labels


def _check(weights: dict[str, WeightView], leaders: dict[str, str], measured: dict[str, InputStatistics]) -> None:
    for name, weight in weights.items():
        if name not in leaders or measured[leaders[name]].tokens == 0:
            # Experts are left out together.
            listed = name if weight.expert is None else name.rpartition(".")[0]
            raise ValueError(
                f"Layer {name!r} saw no calibration token, so its inputs cannot be measured. Use more calibration "
                f"sequences, or add {listed!r} to `exclude_modules`."
            )
    totals = [statistics.input_norm.sum() for statistics in measured.values()]
    for name, total in zip(
        measured, torch.stack([total.to(totals[0].device) for total in totals]).tolist(), strict=True
    ):
        if not total < float("inf"):
            raise ValueError(
                f"Expected finite inputs, but those of layer {name!r} hold NaN or infinity. Check the calibration "
                "data, or run the model in float32 or bfloat16."
            )
        if total == 0:
            raise ValueError(
                f"All inputs of layer {name!r} are zero, so no input can be told from another. Check the calibration "
                "data and the layer before it, or add it to `exclude_modules`."
            )


def _check_gradients(weights: dict[str, WeightView], sums: dict[str, Tensor]) -> None:
    missing = [name for name in weights if name not in sums]
    if missing:
        raise ValueError(
            f"No gradient reached {missing[0]!r} ({len(missing)} such weights). Use more calibration sequences, or "
            "add it to `exclude_modules`."
        )
    finite = torch.stack([total.isfinite().all().cpu() for total in sums.values()]).tolist()
    if not all(finite):
        raise ValueError(
            f"The gradient of {list(sums)[finite.index(False)]!r} is not finite. Run the model in float32 or "
            "bfloat16, and check the calibration data."
        )


# Columns of a Hessian that are summed together: wide enough for a matrix product to run at full speed.
_PANEL = 512


def _add_upper_gram(hessian: Tensor, rows: Tensor) -> None:
    """Add XᵀX on and above the diagonal, in panels: for many columns almost half of the work."""
    for start in range(0, rows.shape[1], _PANEL):
        hessian[start : start + _PANEL, start:].addmm_(rows[:, start : start + _PANEL].T, rows[:, start:])


def _mirror(hessian: Tensor) -> None:
    for start in range(_PANEL, hessian.shape[0], _PANEL):
        hessian[start : start + _PANEL, :start] = hessian[:start, start : start + _PANEL].T
