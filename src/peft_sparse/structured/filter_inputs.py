"""Images on which a convolutional network is traced, and on which two of its states are compared."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.func import functional_call

from ..calibration.inputs import evaluation_mode, model_arguments, tensors_in
from ..model.blocks import base_model
from .channel_trace import Traced, traced
from .examples import example_inputs


# Sizes of images that networks are made for. A linear layer after a flattening takes one size only.
_SIZES = (32, 224, 28, 64, 96, 128)
_IMAGES = 2


def traced_on_image(model: nn.Module, batches: list[dict[str, Any]]) -> tuple[Traced, dict[str, Any]]:
    """Trace `model` on the first input that it takes. Return what was found, and this input.

    Args:
        model: the model.
        batches: model inputs of the caller. The first is tried first, and no others if there is one.

    Raises:
        ValueError: the model takes no input that is tried.
    """
    inner, failures = base_model(model), []
    with evaluation_mode(model):
        for batch in (model_arguments(model, batches[0]),) if batches else _made_for(inner):
            batch = send_to_device(batch, _device(inner))
            try:
                return traced(inner, batch), batch
            except Exception as error:
                # Whether a model takes an input is only known by trying.
                text = str(error).strip().partition("\n")[0].rstrip(".")
                shapes = ", ".join(str(tuple(t.shape)) for t in batch.values() if isinstance(t, Tensor))
                failures.append(f"on {shapes} it fails with {type(error).__name__}: {text}")
    what = "the first batch of `calibration`" if batches else "images that were made for it"
    raise ValueError(
        f"The model cannot be run on {what}, so it is unknown which filters belong together: "
        f"{failures[0] if failures else 'it has no `nn.Conv2d`'}. Pass `calibration` with model inputs that it takes, "
        "such as images (images, channels, height, width)."
    )


@torch.no_grad()
def output_of(model: nn.Module, batch: dict[str, Any], changed: dict[str, Tensor] | None = None) -> list[Tensor]:
    """Return the tensors that `model` returns for `batch`, with the parameters `changed` in the place of its own."""
    inner = base_model(model)
    with evaluation_mode(inner):
        outputs = functional_call(inner, changed, kwargs=batch) if changed else inner(**batch)
    values = list(outputs.to_tuple()) if hasattr(outputs, "to_tuple") else outputs
    return list(tensors_in(values))


def _made_for(model: nn.Module) -> Iterator[dict[str, Any]]:
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if not convs:
        return
    yield from example_inputs(model)
    name = next(iter(inspect.signature(model.forward).parameters), "")
    generator = torch.Generator("cpu").manual_seed(0)
    for size in _SIZES:
        image = torch.randn(_IMAGES, convs[0].in_channels, size, size, generator=generator, device="cpu")
        yield {name: image.to(convs[0].weight.dtype)}


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
