"""Undo the repacking that bitsandbytes does to 4-bit weights on some CPUs.

Whoever dequantises a weight calls this before.
"""

from typing import Any

from torch import nn


def is_repacked_when_run(layer: object) -> bool:
    """Return whether bitsandbytes repacks the weight of `layer` on this CPU, or has done it."""
    return bool(getattr(layer, "support_avx512bf16_for_cpu", False))


def undo_cpu_packing(layer: nn.Module) -> None:
    """Bring a bitsandbytes 4-bit layer into the layout that can be dequantised, and keep it there. In place.

    On CPUs with AVX512-BF16 such a layer repacks its weight when it first runs without gradients. Dequantising the
    repacked weight gives wrong numbers. The function leaves every other layer as it is.
    """
    if not is_repacked_when_run(layer):
        return
    packed: Any = layer
    packed.support_avx512bf16_for_cpu = False
    weight = packed.weight
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        weight.data, state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
        if not state.nested:
            # bitsandbytes' inverse leaves the scales transposed unless they are quantised themselves.
            state.absmax = state.absmax.T.reshape(-1).float()
        weight.quant_state = state
