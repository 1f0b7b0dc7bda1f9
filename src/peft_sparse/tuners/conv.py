"""What MaskLoRA and ScaledLoRA layers around an `nn.Conv2d` share. The class is derived from the one in `layer`."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..model.weights import stored_weight
from .functional import Convolution, Operation
from .layer import SparseLoraLayer


class Conv2dMixin(SparseLoraLayer):
    """Adapters around an `nn.Conv2d`.

    The kernel (out, in / groups, k, k) is treated as the matrix W (out, in / groups · k · k), so A is
    (r, in / groups · k · k) and B is (out, r). Zimmer et al. 2023 (PERP), arXiv:2312.15230, appendix A.2.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the convolution of `x` with the effective weight.

        Args:
            x: (batch, in, height, width) or (in, height, width).
            args: passed on to the base layer where the base layer itself is run.
            kwargs: `adapter_names`, one name for each entry of the batch. Others are passed on to the base layer.

        Returns:
            (batch, out, new height, new width) or (out, new height, new width).

        Raises:
            ValueError: `adapter_names` has another length than the batch, adapters are merged while it is given, or a
                saved mask contradicts the zeros of the base weight.
        """
        return super().forward(x[None], *args, **kwargs)[0] if x.dim() == 3 else super().forward(x, *args, **kwargs)

    def _factor_features(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (stored_weight(self.get_base_layer())[0].numel(), r), (r, self.out_features)

    def _product(
        self,
        x: Tensor,
        names: list[str],
        factors: tuple[Tensor, Tensor, float, float],
        bias: Tensor | None,
        effective: Tensor | None = None,
    ) -> Tensor:
        return super()._product(self._prepared(x), names, factors, bias, effective)

    def _low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return self._operation().apply(self._cast_input_dtype(self._prepared(x), A.dtype), B @ A, None)

    def _with_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._operation().apply(self._prepared(x), weight, self._own_bias())

    def _pads_apart(self) -> bool:
        """Return whether the input is padded before the convolution, as for padding "same" or modes without zeros."""
        conv: Any = self.get_base_layer()
        return isinstance(conv.padding, str) or conv.padding_mode != "zeros"

    def _prepared(self, x: Tensor) -> Tensor:
        """Return `x`, padded where the convolution does not pad it itself."""
        if not self._pads_apart():
            return x
        conv: Any = self.get_base_layer()
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)

    def _operation(self) -> Operation:
        conv: Any = self.get_base_layer()
        padding = (0, 0) if self._pads_apart() else conv.padding
        return Convolution(tuple(conv.weight.shape), conv.stride, padding, conv.dilation, conv.groups)
