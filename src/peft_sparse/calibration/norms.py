"""Measures the running statistics of normalisation layers anew, such as those of BatchNorms after pruning."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from ..model.blocks import base_model
from ..model.processes import agree, exchange, share_of, stopping_together
from ..model.settings import ordinary_settings
from ..model.sharding import has_shards
from ..model.tree import base_layer, walk
from .batch import EnoughSeen
from .inputs import Calibration, as_inputs, count_sequences, evaluation_mode, in_words
from .residence import arguments_there, running


@dataclass(frozen=True)
class NormsReport:
    """What `recalibrate_norms` has measured. As a string, one line.

    Args:
        norms: the names of the layers, in the order in which they were measured.
        samples: the number of samples, such as images.
        seconds: how long it took.
    """

    norms: tuple[str, ...]
    samples: int
    seconds: float

    def __str__(self) -> str:
        count = len(self.norms)
        layers = "1 normalisation layer" if count == 1 else f"{count} normalisation layers"
        return f"New statistics of {layers} from {self.samples} samples, in {self.seconds:.1f} s."


@ordinary_settings()
def recalibrate_norms(
    model: nn.Module, batches: Calibration, *, batch_size: int = 32, keep_unreached: bool = False
) -> NormsReport:
    """Measure the running statistics of normalisation layers anew. In place.

    Pruning changes the inputs of a BatchNorm, so that its running mean and variance no longer fit them. This function
    replaces them by those of the inputs that the layer gets on `batches`. It treats every layer of torch with running
    statistics: BatchNorm, SyncBatchNorm, and InstanceNorm with `track_running_stats`.

    With x (samples, channels, positions) the inputs of a layer on all batches together, and n the number of samples
    times the number of positions,

        BatchNorm      mean = Σ x / n,  var = Σ (x - mean)² / (n - 1)  of each channel, over samples and positions,
        InstanceNorm   mean and var (divided by positions - 1) of each channel of each sample, averaged over samples.

    These are exact for the whole data, and not an average of the batches: they depend neither on the division into
    batches nor on the order, up to rounding. Sums are float64. The model is in evaluation mode, and the layers are
    measured one after the other: when a layer is measured, those that run before it have their new statistics already.
    So each layer normalises its inputs on these data to mean 0 and variance 1. (`torch.optim.swa_utils.update_bn`
    takes the average of the batches, in training mode, where layers before it normalise each batch by itself.)

    The data run once through the whole model, and then once up to each layer. With N layers, this takes the time of
    about N / 2 passes without gradients. The data are read once and kept in memory. Some hundreds of images are
    enough; they should be as mixed as the training set.

    A layer that runs several times in one pass is measured in all of its calls, with its former statistics. Weights,
    gradients, momenta, modes of the modules and the states of torch's random number generators stay as they are.
    `num_batches_tracked` becomes the number of batches. If the model has adapters, they are on as they are now; of
    layers in PEFT's `modules_to_save` (`train_norms`), the active copies are measured. If `torch.distributed` runs
    several processes, each process calls the function with the same model and data. They share the batches, and all
    of them get the same statistics, which are those of all batches. If an error occurs, the statistics are as before.

    Args:
        model: the model, with or without adapters.
        batches: model inputs in the forms of the `calibration` of `prune`: such as dicts with `pixel_values`, tensors
            (samples, channels, height, width), or a `DataLoader` of images, or of images and labels.
        batch_size: how many sequences run together, where they do not come in batches.
        keep_unreached: whether a layer that no batch reaches keeps its statistics, such as one of a head that only
            training uses. False refuses such a model.

    Returns:
        Which layers were measured, on how many samples, and how long it took.

    Raises:
        ValueError: the model has no layer with running statistics, is sharded or on the meta device; there is no
            batch; no batch reaches a layer; or the statistics of a layer are not finite.
        RuntimeError: another process failed.
    """
    started = time.perf_counter()
    with contextlib.ExitStack() as undo:
        undo.enter_context(stopping_together())
        norms = norms_with_statistics(model)
        _check(model, norms)
        # To read a `DataLoader` may draw random numbers too.
        undo.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        inputs = as_inputs(model, batches, batch_size, "batches")
        agree(f"statistics of {len(norms)} normalisation layers by {in_words(inputs)}")
        undo.enter_context(evaluation_mode(model))
        undo.enter_context(_put_back_after_an_error(norms))
        passes = _Passes(model, share_of(inputs))
        order = passes.order_of(norms, keep_unreached)
        for name in order:
            _write(name, norms[name], passes.moments(name, norms[name]))
    return NormsReport(tuple(order), count_sequences(inputs), time.perf_counter() - started)


def norms_with_statistics(model: nn.Module) -> dict[str, _NormBase]:
    """Return the normalisation layers of `model` that keep running statistics, by their names without adapters.

    Raises:
        ValueError: there is none.
    """
    found: dict[int, tuple[str, _NormBase]] = {}
    for name, module in walk("", base_model(model)):
        layer = base_layer(module)
        if isinstance(layer, _NormBase) and layer.running_mean is not None:
            found.setdefault(id(layer), (name, layer))
    if not found:
        raise ValueError(
            f"Expected a model with layers that keep running statistics, such as BatchNorm, and "
            f"{type(base_model(model)).__name__} has none. Other norms, such as LayerNorm, need no new statistics."
        )
    return dict(found.values())


@dataclass(frozen=True)
class _Moments:
    """Count, mean and variance of the inputs of a layer, by call: (calls,), (calls, channels), (calls, channels)."""

    counts: Tensor
    means: Tensor
    variances: Tensor
    batches: int


class _Passes:
    """Runs the batches of this process through the model, and observes layers.

    Args:
        model: the model, in evaluation mode.
        inputs: the batches of this process. There may be none.
    """

    def __init__(self, model: nn.Module, inputs: list[dict[str, Any]]) -> None:
        self.model = base_model(model)
        self.inputs = inputs
        # How often a batch calls a layer.
        self.calls: list[Counter[str]] = []
        # A hook or a replaced forward may wait for its module to return.
        self.may_stop = not any(m._forward_hooks or "forward" in m.__dict__ for m in self.model.modules())

    def order_of(self, norms: dict[str, _NormBase], keep_unreached: bool) -> list[str]:
        """Return the names of `norms` in the order of their first calls, and note how often each batch calls them."""
        with contextlib.ExitStack() as undo:
            for name, norm in norms.items():
                undo.callback(norm.register_forward_pre_hook(partial(self._count, name)).remove)
            for number, batch in enumerate(self.inputs):
                self.calls.append(Counter())
                with running(self.model, batch, f"batch {number} of the data"):
                    self._run(batch)
        own = list(dict.fromkeys(name for calls in self.calls for name in calls))
        order = list(dict.fromkeys(name for names in exchange(own) for name in names))
        missing = [name for name in norms if name not in order]
        if missing and not keep_unreached:
            raise ValueError(
                f"No batch reaches {len(missing)} of the {len(norms)} layers with running statistics, such as "
                f"{missing[0]!r}. Give batches that run all of them, or let these layers keep their statistics with "
                "`keep_unreached=True`. Nothing was changed."
            )
        return order

    def moments(self, name: str, norm: _NormBase) -> _Moments:
        """Return the moments of the inputs of `norm` on the batches of all processes."""
        seen: list[tuple[int, Tensor, Tensor]] = []
        for batch, calls in zip(self.inputs, self.calls, strict=True):
            if calls[name]:
                last = len(seen) + calls[name] if self.may_stop else None
                hook = norm.register_forward_pre_hook(partial(_observe, seen, last), with_kwargs=True)
                try:
                    with contextlib.suppress(EnoughSeen):
                        self._run(batch)
                finally:
                    hook.remove()
        own = None
        if seen:
            counts = torch.tensor([count for count, _, _ in seen], dtype=torch.float64)
            own = counts, _stacked([mean for _, mean, _ in seen]), _stacked([variance for _, _, variance in seen])
        met = exchange((own, sum(calls[name] > 0 for calls in self.calls)))
        counted, means, variances = (torch.cat([part[i] for part, _ in met if part]) for i in range(3))
        return _Moments(counted, means, variances, sum(batches for _, batches in met))

    def _run(self, batch: dict[str, Any]) -> None:
        self.model(**arguments_there(self.model, batch))

    def _count(self, name: str, norm: nn.Module, args: Any) -> None:
        self.calls[-1][name] += 1


def _observe(
    seen: list[tuple[int, Tensor, Tensor]], last: int | None, norm: _NormBase, args: Any, kwargs: dict[str, Any]
) -> None:
    """Note count, mean and variance of the inputs of a call. Raise `EnoughSeen` after call number `last`."""
    inputs: Tensor = (args[0] if args else kwargs["input"]).detach()
    inputs = inputs if inputs.dtype == torch.float64 else inputs.float()
    by_sample = isinstance(norm, _InstanceNorm)
    if isinstance(norm, _InstanceNorm) and inputs.dim() == norm._get_no_batch_dim():
        inputs = inputs[None]
    positions = [*range(2, inputs.dim())]
    if inputs.numel() and by_sample:
        variances, means = torch.var_mean(inputs, positions)
        seen.append((len(inputs), means.mean(0), variances.mean(0)))
    elif inputs.numel():
        variance, mean = torch.var_mean(inputs, [0, *positions], correction=0)
        seen.append((inputs.numel() // inputs.shape[1], mean, variance))
    if last is not None and len(seen) == last:
        raise EnoughSeen


def _stacked(moments: list[Tensor]) -> Tensor:
    # One transfer from the device. Not all devices have float64.
    return torch.stack(moments).cpu().double()


def _write(name: str, norm: _NormBase, moments: _Moments) -> None:
    """Write the mean and variance over all calls into `norm`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weights, total = moments.counts[:, None], moments.counts.sum()
    mean = (weights * moments.means).sum(0) / total
    spread = weights * moments.variances
    if not isinstance(norm, _InstanceNorm):
        spread = spread + weights * (moments.means - mean).square()
        # BatchNorm keeps the unbiased variance.
        total = total - 1
    variance = spread.sum(0) / total
    if not (mean.isfinite().all() and variance.isfinite().all()):
        raise ValueError(
            f"The statistics of {name!r} are not finite. Expected inputs that are finite, and at least two values for "
            "each channel. Check the data and the weights, or give more samples. Nothing was changed."
        )
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(moments.batches)


def _check(model: nn.Module, norms: dict[str, _NormBase]) -> None:
    if has_shards(model):
        raise ValueError(
            "New statistics need the whole model in each process, and its weights are sharded. Call "
            "`recalibrate_norms` before they are sharded, or on the model that was saved."
        )
    away = next(
        (name for name, norm in norms.items() if norm.running_mean is not None and norm.running_mean.is_meta), None
    )
    if away is not None:
        raise ValueError(
            f"The statistics of {away!r} are on the meta device, where nothing can be written. Load the model into "
            "memory first."
        )


@contextlib.contextmanager
def _put_back_after_an_error(norms: dict[str, _NormBase]) -> Iterator[None]:
    buffers = [buffer for norm in norms.values() for buffer in norm.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    except BaseException:
        for buffer, former in zip(buffers, before, strict=True):
            buffer.copy_(former)
        raise
