"""The base weight of one adapted layer: read it, write it, keep it while adapters are merged, prune it by saved masks.

`SparseLoraLayer` in `layer` is derived from `BaseWeight`.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..model.cpu_packing import undo_cpu_packing
from ..model.masks import mask_of, pack, unpack
from ..model.sharding import is_partitioned
from ..model.weights import as_matrix, as_stored, stored_weight
from .config import SparseLoraConfig
from .functional import Factor, Weight


# A fraction of the entries of a weight. Dense checkpoints have a few zeros, so a weight with a smaller fraction of
# zeros does not count as pruned. Zeros that a saved mask keeps contradict the mask only above this fraction.
STRAY_ZEROS = 0.01


_FORWARDS = {nn.Linear.forward, Conv1D.forward, nn.Conv2d.forward}


class BaseWeight(nn.Module, BaseTunerLayer):
    """The frozen base weight of one adapted layer. Its zeros are the mask.

    The mask is read off the weight wherever it is needed. A copy of it is stored only for adapters with `save_mask`.

    Args:
        base_layer: the layer to adapt, or another tuner's layer around it.
        quantization: what `peft.utils.get_quantization_kwargs` returns for the model.
    """

    prefix: str
    factor: Factor
    merged_adapters: list[str]

    # PEFT and subclasses define these. Without declared types a type checker takes them for tensors or modules.
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
        # The layer is in a tuple, because a plain attribute would make it a submodule.
        self._unmerged_layer: tuple[nn.Module] | None = None
        # The adapters whose saved mask is not yet written into the base weight, with their `on_mask_mismatch`.
        self._unsettled: dict[str, str] = {}
        # The adapters whose mask could not be read off the base weight, so that it must be loaded.
        self._empty_masks: set[str] = set()
        undo_cpu_packing(self.get_base_layer())
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization)
        self.in_features, self.out_features = self._features()

    @property
    def saved_masks(self) -> dict[str, Tensor]:
        """The packed masks, by name of the adapter. Only adapters with `save_mask` have one."""
        return getattr(self, f"{self.prefix}mask")

    def pruned_weight(self) -> Tensor:
        """Return the base weight before any merge, as a matrix (out, in). Its zeros are the mask.

        A saved mask that is not yet written into the base weight is written first.

        Raises:
            ValueError: a saved mask contradicts the zeros of the base weight.
        """
        self._settle_masks()
        return self._matrix(self._stored_unmerged())

    def read_weight(self) -> Tensor:
        """Return the base weight laid out as the layer stores it: (out, in) for `nn.Linear`, (in, out) for `Conv1D`.

        While adapters are merged, this is the merged weight. The result shares the memory of the layer, unless the
        layer is quantised: then it is the dequantised weight.
        """
        return self.get_base_weight()

    def write_weight(self, weight: Tensor) -> None:
        """Replace the base weight in place by `weight`, laid out as `read_weight` returns it.

        A quantised layer quantises `weight`.
        """
        if self.quantization_backend is not None:
            self.set_base_weight(weight)
        else:
            # Copied, so that the memory format stays and tied weights stay tied.
            stored_weight(self.get_base_layer()).data.copy_(weight)

    # -- how the weight is stored; subclasses for other layers override these ----------------------------------------

    def _features(self) -> tuple[int, int]:
        """Return (in, out)."""
        return _get_in_out_features(self.get_base_layer())

    def _matrix(self, stored: Tensor) -> Tensor:
        return as_matrix(self.get_base_layer(), stored)

    def _as_stored(self, matrix: Tensor) -> Tensor:
        return as_stored(self.get_base_layer(), matrix)

    def _readable(self) -> bool:
        """Return whether the base weight can be read. Some quantised layers cannot be dequantised."""
        return self.quantization_backend is None or self.quantization_backend.supports_merge

    def _is_plain(self) -> bool:
        """Return whether the base layer computes its matrix product and nothing else, and has no hooks."""
        layer = self.get_base_layer()
        if self.quantization_backend is None:
            if is_partitioned(stored_weight(layer)):
                # The hooks are those of ZeRO-3. They gather the weight, and ZeRO-3 gathers it for this layer too.
                return True
            if type(layer).forward not in _FORWARDS:
                return False
        return "forward" not in vars(layer) and not (
            layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
        )

    # -- the weight before a merge -----------------------------------------------------------------------------------

    def _stored_unmerged(self) -> Tensor:
        """Return the base weight before any merge, laid out as the layer stores it."""
        if self._unmerged_layer is not None:
            return self.quantization_backend.get_base_weight(self._unmerged_layer[0])
        return self.read_weight() if self._unmerged_weight is None else self._unmerged_weight

    def _keep_unmerged(self) -> None:
        """Keep a copy of the base weight before the first merge."""
        if self.merged_adapters:
            return
        if self.quantization_backend is None:
            self._unmerged_weight = self.read_weight().cpu().clone()
            return
        # The codes are copied, because quantising the dequantised weight may give other codes.
        layer = copy.copy(self.get_base_layer())
        layer._parameters = copy.deepcopy(layer._parameters)
        if hasattr(layer, "state"):
            # The 8-bit layers of bitsandbytes keep their scales in this attribute.
            layer.state = copy.copy(layer.state)
        self._unmerged_layer = (layer,)

    def _restore_unmerged(self) -> None:
        """Put back the copy that `_keep_unmerged` made."""
        device = self.read_weight().device
        if self._unmerged_layer is not None:
            vars(self.get_base_layer()).update(vars(self._unmerged_layer[0].to(device)))
        elif self._unmerged_weight is not None:
            self.write_weight(self._unmerged_weight.to(device))
        self._unmerged_weight = self._unmerged_layer = None

    # -- saved masks -------------------------------------------------------------------------------------------------

    def add_saved_mask(self, adapter_name: str, config: SparseLoraConfig) -> None:
        """Add a buffer for the mask that is saved with the adapter, filled with the mask of the base weight.

        If the base weight cannot be read, the buffer holds zeros until a saved mask is loaded.

        Args:
            adapter_name: name of the adapter.
            config: its configuration. If it comes from a saved adapter, loading replaces the buffer, and the base
                weight is pruned by it when the adapter is first used.
        """
        if self._readable():
            self.saved_masks[adapter_name] = pack(mask_of(self._stored_unmerged()))
        else:
            size = -(-self.out_features * self.in_features // 8)
            self.saved_masks[adapter_name] = torch.zeros(size, dtype=torch.uint8)
            self._empty_masks.add(adapter_name)
        if config.mask_fingerprints:
            # Only the configuration of a saved adapter has fingerprints.
            self._unsettled[adapter_name] = config.on_mask_mismatch

    def refresh_saved_mask(self, name: str) -> None:
        """Write the mask of the base weight into the saved mask of adapter `name`, if there is one.

        The base weight may have been pruned after the adapter was attached.
        """
        if name in self.saved_masks and self._readable():
            self._settle_masks()
            self.saved_masks[name].copy_(pack(mask_of(self._stored_unmerged())))

    @torch.no_grad()
    def _settle_masks(self) -> None:
        """Prune the base weight by the saved masks of loaded adapters, once for each adapter."""
        # A merged weight is replaced when the adapters are unmerged, so pruning waits until then.
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
                    f"Expected a base weight that is dense or has the zeros of adapter {name!r}. The mask saved with "
                    f"the adapter keeps {stray:.1%} of the entries of this weight although they are zero. Load the "
                    "adapter onto the dense model or onto the model it was trained on, or set "
                    '`on_mask_mismatch="warn"`.'
                )
            if bool(((weight != 0) & ~mask).any()):
                self.write_weight(weight.masked_fill(~mask, 0))

    def _weight_source(self, names: list[str]) -> Weight:
        """Return the base weight for `sparse_lora`, or a function that computes it where it is costly to keep."""
        if not self._readable():
            self._check_saved_mask(names[0])
            return partial(self._given_mask, names[0])
        # A dequantised weight, or one that ZeRO-3 gathered, would stay in memory until backward.
        again = self.quantization_backend is not None or is_partitioned(stored_weight(self.get_base_layer()))
        return self.pruned_weight if again else self.pruned_weight()

    def _given_mask(self, name: str) -> Tensor:
        """Return the saved mask as a float matrix. MaskLoRA uses only the zeros of W, so the mask can stand for W."""
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
                "Expected a base weight that can be dequantised. The weights of "
                f"{self.quantization_backend.backend_name} layers cannot be read, so their zeros are unknown. Use a "
                "MaskLoRA adapter saved with `save_mask=True`, or another base."
            )
