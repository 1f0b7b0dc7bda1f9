"""The weight below the adapters: reading it, keeping it while merged, and the masks that adapters carry along."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..model.masks import mask_of, pack, unpack
from ..model.sharding import is_partitioned
from ..model.weights import as_matrix, as_stored, stored_weight
from .config import SparseLoraConfig
from .cpu_packing import undo_cpu_packing
from .functional import Factor, Weight


# A dense checkpoint has a few zeros: below this share a weight is not called pruned, and zeros that an adapter's saved
# mask keeps are no contradiction.
STRAY_ZEROS = 0.01


_FORWARDS = {nn.Linear.forward, Conv1D.forward, nn.Conv2d.forward}


class BaseWeight(nn.Module, BaseTunerLayer):
    """A tuner layer's base weight, whose zeros are the mask; nothing of the mask is stored unless `save_mask` asks."""

    prefix: str
    factor: Factor
    merged_adapters: list[str]

    # Types of what PEFT and subclasses define, which a type checker otherwise takes for any attribute of a module.
    base_layer: nn.Module
    bias: Tensor | None
    get_base_layer: Callable[[], nn.Module]
    get_base_weight: Callable[[], Tensor]
    set_base_weight: Callable[[Tensor], None]

    def __init__(self, base_layer: nn.Module, **quantization: Callable[..., object]) -> None:
        super().__init__()
        self.base_layer = base_layer
        setattr(self, f"{self.prefix}mask", BufferDict(persistent=True))
        self._unmerged_weight: Tensor | None = None
        # In a tuple, or it would be a submodule.
        self._unmerged_layer: tuple[nn.Module] | None = None
        self._unsettled: dict[str, str] = {}
        # Masks that could not be read off the base, and must be loaded before they are used.
        self._empty_masks: set[str] = set()
        undo_cpu_packing(self.get_base_layer())
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization)
        self.in_features, self.out_features = self._features()

    @property
    def saved_masks(self) -> dict[str, Tensor]:
        """Packed masks of the adapters that carry one."""
        return getattr(self, f"{self.prefix}mask")

    def pruned_weight(self) -> Tensor:
        """Return the base weight as a matrix (out, in), as it was before any merge: its zeros are the mask."""
        self._settle_masks()
        return self._matrix(self._stored_unmerged())

    def read_weight(self) -> Tensor:
        """Return the base weight as the layer stores it: (out, in) for `nn.Linear`, (in, out) for `Conv1D`.

        The result shares the layer's memory. It is the merged weight while adapters are merged. A quantised weight is
        dequantised, into memory of its own.
        """
        return self.get_base_weight()

    def write_weight(self, weight: Tensor) -> None:
        """Replace the base weight by `weight`, laid out as `read_weight` returns it. A quantised base quantises it."""
        if self.quantization_backend is not None:
            self.set_base_weight(weight)
        else:
            # Into the memory there is: its format stays, and so does every tie to it.
            stored_weight(self.get_base_layer()).data.copy_(weight)

    # -- storage; a layer of another kind overrides these ------------------------------------------------------------

    def _features(self) -> tuple[int, int]:
        return _get_in_out_features(self.get_base_layer())

    def _matrix(self, stored: Tensor) -> Tensor:
        return as_matrix(self.get_base_layer(), stored)

    def _as_stored(self, matrix: Tensor) -> Tensor:
        return as_stored(self.get_base_layer(), matrix)

    def _readable(self) -> bool:
        """Whether the base weight can be read: some quantised kernels do not give it back."""
        return self.quantization_backend is None or self.quantization_backend.supports_merge

    def _is_plain(self) -> bool:
        """Whether running the base layer is no more than a product with its weight, and nobody waits for it to run."""
        layer = self.get_base_layer()
        if self.quantization_backend is None:
            if is_partitioned(stored_weight(layer)):
                # The hooks are those of ZeRO-3, for whom the weight is gathered here.
                return True
            if type(layer).forward not in _FORWARDS:
                return False
        return "forward" not in vars(layer) and not (
            layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
        )

    # -- while merged ------------------------------------------------------------------------------------------------

    def _stored_unmerged(self) -> Tensor:
        if self._unmerged_layer is not None:
            return self.quantization_backend.get_base_weight(self._unmerged_layer[0])
        return self.read_weight() if self._unmerged_weight is None else self._unmerged_weight

    def _keep_unmerged(self) -> None:
        if self.merged_adapters:
            return
        if self.quantization_backend is None:
            self._unmerged_weight = self.read_weight().cpu().clone()
            return
        # The codes themselves: to quantise what they dequantise to need not give them back.
        layer = copy.copy(self.get_base_layer())
        layer._parameters = copy.deepcopy(layer._parameters)
        if hasattr(layer, "state"):
            # Where bitsandbytes' 8-bit layers keep their scales.
            layer.state = copy.copy(layer.state)
        self._unmerged_layer = (layer,)

    def _restore_unmerged(self) -> None:
        device = self.read_weight().device
        if self._unmerged_layer is not None:
            vars(self.get_base_layer()).update(vars(self._unmerged_layer[0].to(device)))
        elif self._unmerged_weight is not None:
            self.write_weight(self._unmerged_weight.to(device))
        self._unmerged_weight = self._unmerged_layer = None

    # -- masks that adapters carry -----------------------------------------------------------------------------------

    def add_saved_mask(self, adapter_name: str, config: SparseLoraConfig) -> None:
        """Make room for the mask that is saved with the adapter, and fill it with the mask at hand."""
        if self._readable():
            self.saved_masks[adapter_name] = pack(mask_of(self._stored_unmerged()))
        else:
            size = -(-self.out_features * self.in_features // 8)
            self.saved_masks[adapter_name] = torch.zeros(size, dtype=torch.uint8)
            self._empty_masks.add(adapter_name)
        if config.mask_fingerprints:
            # The configuration comes from a file, whose mask is about to replace this one.
            self._unsettled[adapter_name] = config.on_mask_mismatch

    def refresh_saved_mask(self, name: str) -> None:
        """Bring the saved mask of adapter `name` up to date: the base may have been pruned since it was attached."""
        if name in self.saved_masks and self._readable():
            self._settle_masks()
            self.saved_masks[name].copy_(pack(mask_of(self._stored_unmerged())))

    @torch.no_grad()
    def _settle_masks(self) -> None:
        """Prune the base by the masks that adapters brought along. Once per adapter, when it is first used."""
        # Not while merged: the merged weight is not the one to prune.
        while self._unsettled and self._readable() and not self.merged_adapters:
            name, on_mismatch = self._unsettled.popitem()
            if name not in self.saved_masks:
                continue  # the adapter was deleted before it was used
            weight = self.read_weight()
            if weight.is_meta or weight.numel() == 0 or self.saved_masks[name].is_meta:
                self._unsettled[name] = on_mismatch
                return
            mask = unpack(self.saved_masks[name].to(weight.device), weight.shape)
            stray = float(((weight == 0) & mask).sum()) / weight.numel()
            if stray > STRAY_ZEROS and on_mismatch == "error":
                self._unsettled[name] = on_mismatch
                raise ValueError(
                    f"Adapter {name!r} carries a mask that keeps {stray:.1%} of the entries that are zero in this "
                    "base weight. Load it onto the dense model or the one it was trained on, or set "
                    '`on_mask_mismatch="warn"`.'
                )
            if bool(((weight != 0) & ~mask).any()):
                self.write_weight(weight.masked_fill(~mask, 0))

    def _weight_source(self, names: list[str]) -> Weight:
        # Neither a dequantised weight nor an unpacked mask is worth keeping until backward.
        if not self._readable():
            self._check_saved_mask(names[0])
            return partial(self._given_mask, names[0])
        # What ZeRO-3 gathered would stay in memory until backward, for which it gathers anew.
        again = self.quantization_backend is not None or is_partitioned(stored_weight(self.get_base_layer()))
        return self.pruned_weight if again else self.pruned_weight()

    def _given_mask(self, name: str) -> Tensor:
        """The saved mask as numbers: all MaskLoRA needs of a base that cannot be dequantised."""
        shape = torch.Size((self.out_features, self.in_features))
        return unpack(self.saved_masks[name], shape).float()

    def _check_saved_mask(self, name: str) -> None:
        found = self.factor == "mask" and name in self.saved_masks
        if found and name in self._empty_masks:
            found = bool(self.saved_masks[name].any())
            if found:
                self._empty_masks.remove(name)
        if not found:
            raise TypeError(
                f"The weights of {self.quantization_backend.backend_name} layers cannot be read, so there are no "
                "zeros to see. Use a MaskLoRA adapter saved with `save_mask=True`, or a base that can be dequantised."
            )
