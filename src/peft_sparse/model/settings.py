"""Settings of torch that change what a model computes, put to their ordinary values while the package works."""

import contextlib
import sys
from collections.abc import Iterator

import torch


# The devices that autocast knows, whether or not this machine has them.
_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla", torch._C._get_privateuse1_backend_name())


@contextlib.contextmanager
def ordinary_settings() -> Iterator[None]:
    """Within this context, or a function that it decorates, settings of the caller cannot change results.

    There is no autocast, no inference mode and no gradient. New tensors are float32 and on the CPU unless they say
    otherwise. Compiled modules run eagerly, so that hooks in them are called. Attention layers of torch call their
    projections and do not take their fused path. Afterwards, everything is as it was, also after an error.
    """
    with contextlib.ExitStack() as undo:
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.no_grad())
        # Autocast keeps copies of weights, which writing to a weight does not change.
        undo.callback(torch.clear_autocast_cache)
        for device_type in _DEVICE_TYPES:
            if torch.is_autocast_enabled(device_type):
                undo.callback(torch.set_autocast_enabled, device_type, True)
                torch.set_autocast_enabled(device_type, False)
        torch.clear_autocast_cache()
        undo.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            undo.enter_context(torch.device("cpu"))
        if "torch._dynamo" in sys.modules:
            # Where nothing has been compiled, this would only load the compiler, which takes a second.
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        yield
