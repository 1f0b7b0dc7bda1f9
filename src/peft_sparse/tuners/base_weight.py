"""The base weight of one adapted layer: read it, write it, keep it while adapters are merged.

`SavedMasks` in `saved_masks` is derived from `BaseWeight`, and `SparseLoraLayer` in `layer` from both.
"""

import copy
from collections.abc import Callable

from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter
from transformers.pytorch_utils import Conv1D

from ..model.cpu_packing import undo_cpu_packing
from ..model.kinds import computation, is_quantised
from ..model.sharding import is_partitioned
from ..model.weights import as_matrix, as_stored, stored_weight
from .functional import Factor
from .fused import PLAIN


# The forward passes that are one product with the weight and nothing else.
FORWARDS = {nn.Linear.forward, Conv1D.forward, nn.Conv2d.forward}


def _is_packed(stored: object) -> bool:
    # A quantised layer of torch has a method `weight`. A DTensor is a tensor subclass, as those of torchao are.
    return not isinstance(stored, Tensor) or (not isinstance(stored, DTensor) and is_quantised(stored))


def is_hooked(layer: nn.Module) -> bool:
    """Return whether torch runs hooks when `layer` is called."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def runs_alone(layer: nn.Module) -> bool:
    """Return whether `layer` has no hooks and no forward of its own beside that of its class."""
    return "forward" not in vars(layer) and not is_hooked(layer)


def check_stored(name: str, layer: nn.Module, parameter: str = "weight") -> None:
    """Check that the base weight of the layer `name` is stored, so that a merged weight can be written into it.

    Raises:
        ValueError: it is computed from other parameters, such as by `torch.nn.utils.parametrize`, or it has no shape
            yet, as in `torch.nn.LazyLinear`.
    """
    if isinstance(layer._parameters.get(parameter), UninitializedParameter):
        raise ValueError(
            f"The weight of {name!r} has no shape and no values until the model has run. Run it on one batch first, "
            "and attach the adapter then."
        )
    undoing = computation(layer, parameter)
    if undoing:
        raise ValueError(
            f"The weight of {name!r} is computed from other parameters, so that an adapter that is merged into it "
            f"would not last. {undoing}"
        )


def wrappers_around(module: nn.Module) -> list[BaseTunerLayer]:
    """Return the tuner layers around one layer, the outermost first."""
    found: list[BaseTunerLayer] = []
    while isinstance(module, BaseTunerLayer):
        found.append(module)
        module = module.base_layer
    return found


def adapted_parameter(wrapper: BaseTunerLayer) -> str:
    """Return the name of the parameter of the base layer that `wrapper` adapts."""
    return getattr(wrapper, "parameter_name", None) or "weight"


class BaseWeight(nn.Module, BaseTunerLayer):
    """The base weight of one adapted layer. Its zeros are the mask, which is read off the weight where it is needed.

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
        self._unmerged_weight: Tensor | None = None
        # The layer is in a tuple, because a plain attribute would make it a submodule.
        self._unmerged_layer: tuple[nn.Module] | None = None
        # Whether the base weight is also that of another module, such as an embedding, and the parameter that they
        # share while they differ.
        self.is_tied = False
        self._shared: tuple[nn.Parameter] | None = None
        undo_cpu_packing(self.get_base_layer())
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization)
        self.in_features, self.out_features = self._features()
        # A class may compute more in its `__call__` than its forward pass.
        self._is_called_as_usual = type(self.get_base_layer()).__call__ is nn.Module.__call__

        # The layers of this package around the same weight, which a mixed model may have, and which of them merged its
        # adapters first.
        self._beside: list[BaseWeight] = []
        self._merge_rank = 0
        # The layers of other methods within this one whose adapters belong to the base weight, because they were
        # merged when this layer was attached. They are in a tuple, so that they do not become submodules.
        self._attached_on = tuple(layer for layer in self._foreign_inside() if layer.merged)

    def read_weight(self) -> Tensor:
        """Return the base weight laid out as the layer stores it: (out, in) for `nn.Linear`, (in, out) for `Conv1D`.

        While adapters are merged, this is the merged weight. The result shares the memory of the layer, unless the
        layer is quantised: then it is the dequantised weight.

        Raises:
            ValueError: the weight was quantised after the adapter was attached.
        """
        stored = stored_weight(self.get_base_layer()) if self.quantization_backend is None else None
        if type(stored) not in PLAIN and stored is not None and _is_packed(stored):
            raise ValueError(
                f"The weight of a {type(self.get_base_layer()).__name__} was quantised after an adapter was attached "
                f"to it: it is a {type(stored).__name__}. Quantise the base model first, and attach or load the "
                "adapter then."
            )
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

    def stored_parameter(self) -> Tensor | None:
        """Return the parameter that stores the base weight. None if the layer stores it in another way."""
        return self.get_base_layer()._parameters.get("weight")

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
            if type(layer).forward not in FORWARDS:
                return False
        return self._is_called_as_usual and runs_alone(layer)

    # -- other layers around the same weight -------------------------------------------------------------------------

    def stand_beside(self, layers: list["BaseWeight"]) -> None:
        """Let this layer and those in `layers`, which are around the same weight, know each other."""
        for layer in layers:
            layer._beside.append(self)
        self._beside = list(layers)

    def _merged_beside(self) -> list["BaseWeight"]:
        """Return the other layers of this package around the weight whose adapters are merged."""
        return [layer for layer in self._beside if layer.merged_adapters]

    def _foreign_inside(self) -> list[BaseTunerLayer]:
        """Return the layers of other methods within this one that are around the same weight."""
        inside = [layer for layer in wrappers_around(self.base_layer) if not isinstance(layer, BaseWeight)]
        return [layer for layer in inside if adapted_parameter(layer) == adapted_parameter(self)]

    def _foreign_merged(self) -> list[BaseTunerLayer]:
        """Return the layers of other methods within this one that were merged after this one was attached."""
        known = {id(layer) for layer in self._attached_on}
        return [layer for layer in self._foreign_inside() if layer.merged and id(layer) not in known]

    # -- the weight before a merge -----------------------------------------------------------------------------------

    def _stored_unmerged(self) -> Tensor:
        """Return the base weight before any merge, laid out as the layer stores it."""
        if not self._beside:
            return self._kept_unmerged()
        merged = self._merged_beside() + ([self] if self.merged_adapters else [])
        return min(merged, key=lambda layer: layer._merge_rank, default=self)._kept_unmerged()

    def _kept_unmerged(self) -> Tensor:
        """Return the copy of the base weight that `_keep_unmerged` made, or the base weight if there is none."""
        if self._unmerged_layer is not None:
            return self.quantization_backend.get_base_weight(self._unmerged_layer[0])
        return self.read_weight() if self._unmerged_weight is None else self._unmerged_weight

    def _keep_unmerged(self) -> None:
        """Keep a copy of the base weight before the first merge."""
        if self.merged_adapters:
            return
        self._merge_rank = 1 + max((layer._merge_rank for layer in self._merged_beside()), default=0)
        if self.quantization_backend is None:
            # The other module holds the weight of a tied layer already.
            weight = self.read_weight()
            self._unmerged_weight = weight if self.is_tied else weight.to("cpu", copy=True)
            return
        # The codes are copied, because quantising the dequantised weight may give other codes.
        layer = copy.copy(self.get_base_layer())
        layer._parameters = copy.deepcopy(layer._parameters)
        if hasattr(layer, "state"):
            # The 8-bit layers of bitsandbytes keep their scales in this attribute.
            layer.state = copy.copy(layer.state)
        self._unmerged_layer = (layer,)

    def _leave_others(self) -> None:
        """Give a layer that shares its weight with another module a weight of its own. A merge changes no other."""
        if not self.is_tied or self._shared is not None:
            return
        layer = self.get_base_layer()
        shared = layer._parameters["weight"]
        assert shared is not None
        self._shared = (shared,)
        layer._parameters["weight"] = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)

    def _restore_unmerged(self) -> None:
        """Put back the copy that `_keep_unmerged` made."""
        if self._shared is not None:
            self.get_base_layer()._parameters["weight"] = self._shared[0]
            self._shared = self._unmerged_weight = None
            return
        device = self.read_weight().device
        if self._unmerged_layer is not None:
            vars(self.get_base_layer()).update(vars(self._unmerged_layer[0].to(device)))
        elif self._unmerged_weight is not None:
            self.write_weight(self._unmerged_weight.to(device))
        self._unmerged_weight = self._unmerged_layer = None
