"""SparseLoraModel: put adapters into a model, as PEFT's `BaseTuner` asks for.

`mask_lora` and `scaled_lora` derive their models from it. A derived model sets three class attributes.
"""

import contextlib
from collections import Counter
from collections.abc import Hashable, Iterator
from functools import partial
from typing import Any, ClassVar, Literal, cast

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..model.blocks import base_layer
from .base_weight import adapted_parameter, check_stored, wrappers_around
from .combining import Combination, combine
from .config import SparseLoraConfig
from .factors import check_adapter_name
from .groups import select_groups
from .hotswap import whole_pairs
from .layer import SparseLoraLayer
from .merging import plain_model
from .proof import check_masks, proof_to_save, receive, report_oddities
from .saved_masks import names_alone
from .ties import give_own_weights, settle_ties
from .unsaved import offloaded_values, remember_statistics, unmerged_weights, warn_of_unsaved
from .used_by_others import weights_read_by


# The kernels of these models read the weights of these projections directly, so an adapter would have no effect.
MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBA_BYPASSED = ("out_proj", "conv1d")

# What PEFT offers for a model with LoRA and not for every tuner. Without a word of its own, `__getattr__` of PEFT's
# models would look for these names in the base model.
LORAS_OWN = {name for name in vars(LoraModel) if not hasattr(BaseTuner, name)} - {
    "add_weighted_adapter",
    "prefix",
    "tuner_layer_cls",
}


class SparseLoraModel(BaseTuner):
    """Base class of `MaskLoraModel` and `ScaledLoraModel`, which `peft.get_peft_model` makes."""

    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()
    layer_classes: ClassVar[dict[str, type[SparseLoraLayer]]]
    _tied_weights: set[int] | None
    # What was replaced since an adapter began to be attached, as (module, name in it, what was there).
    _replaced: list[tuple[nn.Module, str, nn.Module]] | None = None
    # The modules that the model holds under several names, by what identifies them: (module, where it is held).
    _holders: dict[int, tuple[nn.Module, list[tuple[nn.Module, str]]]] | None

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter, as PEFT does. If this fails, the model is as before."""
        before = {id(module) for module in model.modules() if _has_adapter(module, adapter_name)}
        self._replaced = []
        try:
            BaseTuner.inject_adapter(self, model, adapter_name, *args, **kwargs)
        except Exception:
            for holder, name, child in reversed(self._replaced):
                setattr(holder, name, child)
            for module in model.modules():
                if id(module) not in before and _has_adapter(module, adapter_name):
                    cast(Any, module).delete_adapter(adapter_name)
            raise
        finally:
            self._replaced = None

    def _prepare_adapter_config(self, peft_config: SparseLoraConfig, model_config: dict[str, Any]) -> SparseLoraConfig:
        if peft_config.target_modules is None and peft_config.target_parameters:
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: SparseLoraConfig, model: nn.Module) -> None:
        # PEFT calls this before it changes a module, so an adapter that is refused here leaves the model as it was.
        check_masks(model, peft_config)
        select_groups(model, peft_config)
        self._tied_weights = self._holders = None

    def _post_injection_hook(self, model: nn.Module, config: SparseLoraConfig, adapter_name: str) -> None:
        report_oddities(model, config, adapter_name)
        remember_statistics(model, config)

    def _check_new_adapter_config(self, config: SparseLoraConfig) -> None:
        super()._check_new_adapter_config(config)
        # The wrappers of several parameters of one module are nested, and the saved names contain the nesting.
        for name, other in self.peft_config.items():
            ours, theirs = set(config.target_parameters or ()), set(getattr(other, "target_parameters", None) or ())
            if ours and theirs and ours != theirs:
                raise ValueError(
                    f"All adapters of a model must have the same `target_parameters`. Adapter {name!r} has "
                    f"{sorted(theirs)}, and the new adapter has {sorted(ours)}. Give the new one the same list."
                )

    # PEFT calls this for `ensure_weight_tying`. LoRA's method is about whole modules, and nothing in it is LoRA's own.
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie

    def _add_targets_to_tie(self, peft_config: SparseLoraConfig, tied_weight_keys: list[str]) -> None:
        raise ValueError(
            f"`ensure_weight_tying` cannot tie an adapter on {sorted(tied_weight_keys)[0]!r} to one on the embedding, "
            "because embeddings cannot be adapted. Leave both out of `target_modules`, or train them by "
            "`modules_to_save` or `trainable_token_indices`."
        )

    @staticmethod
    def _check_target_module_exists(peft_config: SparseLoraConfig, key: str) -> Any:
        return key in peft_config._heads or BaseTuner._check_target_module_exists(peft_config, key)

    def _check_target_module_compatiblity(
        self, peft_config: SparseLoraConfig, model: nn.Module, target_name: str
    ) -> None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type in MAMBA_TYPES and target_name in MAMBA_BYPASSED:
            raise ValueError(
                f"{target_name!r} of a {model_type} model cannot be adapted, because the model's kernels read its "
                f"weight directly. Leave {' and '.join(MAMBA_BYPASSED)} out of `target_modules`."
            )

    def _create_and_replace(
        self,
        peft_config: SparseLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        self.create_in(self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name)

    @classmethod
    def create_in(
        cls,
        tuner: BaseTuner,
        peft_config: SparseLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Adapt one module, by a new layer or by one more adapter in the layer that is there.

        Args:
            tuner: the tuner model that holds the module. In a mixed model it is PEFT's `MixedModel`.
            peft_config: configuration of the adapter.
            adapter_name: name of the adapter.
            target: the module to adapt.
            target_name: its name in `parent`.
            parent: the module that holds it.
            current_key: its name in the model, for `rank_pattern` and `alpha_pattern`.
            parameter_name: name of the parameter to adapt in `target`. None adapts the layer `target` itself.

        Raises:
            TypeError: a module of this class cannot be adapted.
            ValueError: the weight of the layer is computed from other parameters or has no values yet, or no module
                can have the name of the adapter.
        """
        check_adapter_name(adapter_name)
        if parameter_name is None:
            check_stored(current_key, base_layer(target))
        r, lora_alpha = peft_config.rank_and_alpha(current_key)
        around = [one for one in wrappers_around(target) if adapted_parameter(one) == (parameter_name or "weight")]
        own = next((layer for layer in around if isinstance(layer, cls.tuner_layer_cls)), None)
        if own is not None:
            own.update_layer(adapter_name, r, lora_alpha, peft_config)
            return
        reads_weights = weights_read_by(cast(Hashable, type(parent)))
        is_read = parameter_name is None and target_name in reads_weights
        if around and parameter_name is None and not isinstance(tuner, SparseLoraModel):
            # The innermost layer is the last to be unmerged, and puts the very base weight back.
            parent, target_name, target = cast(nn.Module, around[-1]), "base_layer", around[-1].base_layer
        options = get_quantization_kwargs(tuner.model)
        layer_cls = cls._layer_class_for(target, parameter_name, options)
        if parameter_name is not None:
            options["parameter_name"] = parameter_name
        layer = layer_cls(target, adapter_name, r, lora_alpha, peft_config, **options)
        layer.all_adapters = tuner.peft_config
        layer.is_read_by_parent = is_read
        layer.stand_beside([other for other in around if isinstance(other, SparseLoraLayer)])
        weight = base_layer(target)._parameters.get("weight")
        layer.is_tied = parameter_name is None and id(weight) in _tied_weights(tuner)
        if adapter_name not in tuner.active_adapters:
            layer.requires_grad_(False)
        tuner._replace_module(parent, target_name, layer, target)

    @classmethod
    def _layer_class_for(
        cls, target: nn.Module, parameter_name: str | None, quantization: dict[str, Any]
    ) -> type[SparseLoraLayer]:
        if parameter_name is not None:
            return cls.layer_classes["parameter"]
        layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(layer, (nn.Linear, Conv1D)):
            return cls.layer_classes["linear"]
        if isinstance(layer, nn.Conv2d):
            return cls.layer_classes["conv2d"]
        backend = resolve_quantization_backend(layer, **quantization)
        if backend is not None and backend.layer_type == "linear":
            return cls.layer_classes["linear"]
        raise TypeError(
            f"Target module {target} is not supported. {cls.__name__} adapts `torch.nn.Linear`, `torch.nn.Conv2d` and "
            "`transformers.pytorch_utils.Conv1D`. Leave the module out of `target_modules`."
        )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version also reads `weight`, which the module that holds fused experts does not have. It moves
        # adapters to the device of the base weight, which our layers do themselves.
        # The model may hold one layer under several names, and may call it by any of them.
        for holder, name in [(parent, child_name), *self._held_by(child)]:
            if self._replaced is not None:
                self._replaced.append((holder, name, child))
            setattr(holder, name, new_module)

    def _held_by(self, child: nn.Module) -> list[tuple[nn.Module, str]]:
        """Return the modules that hold `child`, with the name of it in them, if there are several."""
        if self._holders is None:
            holders: dict[int, tuple[nn.Module, list[tuple[nn.Module, str]]]] = {}
            for holder in self.model.modules():
                for name, held in holder._modules.items():
                    if held is not None:
                        holders.setdefault(id(held), (held, []))[1].append((holder, name))
            self._holders = {key: found for key, found in holders.items() if len(found[1]) > 1}
        return self._holders.get(id(child), (child, []))[1]

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add an adapter that computes the weighted sum of others. The active adapters stay active.

        With the weights w_i and the scalings s_i that the adapters have now, its update is Σ w_i s_i H ⊙ (B_i A_i).
        H is M for MaskLoRA and W for ScaledLoRA. A ScaledLoRA adapter with `residual=False` has B_i A_i - 1 in the
        place of B_i A_i. The new adapter has `residual=True`. Adapters may differ in layers, rank and scaling.

        Args:
            adapters: names of the adapters.
            weights: one weight for each adapter. A negative weight subtracts the update.
            adapter_name: name of the new adapter. Its scaling is 1, and its A and B are frozen.
            combination_type: "cat" is the exact sum. Its rank is the sum of the ranks, and 1 more if an adapter
                has `residual=False`. "svd" is the best approximation of the combined BA that has the rank `svd_rank`,
                or `svd_rank` + 1 if an adapter has `residual=False`. "ties_svd", "dare_linear_svd", "dare_ties_svd"
                and "magnitude_prune_svd" merge the matrices s_i B_i A_i, or s_i (B_i A_i - 1), by PEFT's functions,
                and approximate the result in the same way. They compute a matrix of the size of the weight.
            svd_rank: the rank for an SVD. None takes the largest rank that an adapter has in the layer.
            svd_clamp: a quantile in [0, 1]. Larger entries of A and B after an SVD are clamped to it. None clamps
                nothing.
            svd_full_matrices: accepted because PEFT has it. The result is the same for both values.
            svd_driver: name of the cuSOLVER method for the SVD on a CUDA device.
            density: fraction of entries of each update that is kept, in (0, 1]. Needed by the last four types.
            majority_sign_method: how "ties_svd" and "dare_ties_svd" find the sign of an entry: "total" adds the
                updates up, "frequency" counts their signs.

        Raises:
            ValueError: an argument has none of its values, an adapter does not exist or trains whole parameters too,
                or the adapters differ in their masks or in `masking`. The model is as before.
        """
        how = Combination(combination_type, svd_rank, svd_clamp, svd_driver, density, majority_sign_method)
        combine(self, adapters, weights, adapter_name, how)

    def __getattr__(self, name: str) -> Any:
        if name in LORAS_OWN:
            raise AttributeError(
                f"{type(self).__name__} has no `{name}`. It belongs to initialisations and variants of LoRA, which "
                "change the base weight or add other terms. Use `peft.LoraConfig` for them."
            )
        return super().__getattr__(name)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """Take the adapters out, as PEFT does. A head that differs from its embedding is no longer tied to it."""
        self._holders = None
        tied = self._changed_tied_weights(adapter_names) if merge and isinstance(self.model, PreTrainedModel) else []
        if not tied:
            return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        # A model that shares its weights with this one shows what the merged model ties, and whether it can be saved.
        merged = cast(PreTrainedModel, plain_model(self.model, merge=False, values=False))
        give_own_weights(merged, tied)
        alone = settle_ties(merged, plain_model(self.model, merge=False, values=False))
        unloaded = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        unloaded.config = merged.config
        give_own_weights(unloaded, alone)
        return unloaded

    def _check_merge_allowed(self) -> None:
        # PEFT calls this before it merges the first layer.
        super()._check_merge_allowed()
        for name, module in self.model.named_modules():
            if isinstance(module, SparseLoraLayer):
                check_stored(name, module.get_base_layer(), getattr(module, "parameter_name", "weight"))

    def _changed_tied_weights(self, adapter_names: list[str] | None) -> list[str]:
        """Return the names, in the base model, of the tied weights into which the adapters are to be merged."""
        layers = [(name, module) for name, module in self.model.named_modules() if isinstance(module, SparseLoraLayer)]
        tied = [(name, layer) for name, layer in layers if layer.is_tied]
        return [f"{name}.weight" for name, layer in tied if layer._present(adapter_names or layer.active_adapters)]

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names` on to every layer during one forward pass. PEFT calls this around the pass."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        layers = [m for m in self.modules() if isinstance(m, (SparseLoraLayer, AuxiliaryTrainingWrapper))]
        self._check_adapter_names(adapter_names, layers)
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in adapter_names for _ in range(beams)]
        # Beam search repeats the entries of the batch for a decoder. An encoder gets them once.
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        in_encoder = {id(module) for module in encoder.modules()} if isinstance(encoder, nn.Module) else set()
        with contextlib.ExitStack() as hooks:
            for layer in layers:
                names = adapter_names if id(layer) in in_encoder and encoder is not self.model else repeated
                if isinstance(layer, AuxiliaryTrainingWrapper):
                    # An adapter that trains no copy of this module uses the module of the base model.
                    trained = layer._get_available_adapters()
                    names = [name if name in trained else "__base__" for name in names]
                elif isinstance(layer, SparseLoraLayer):
                    hooks.enter_context(layer.in_mixed_batch())
                hook = partial(_with_adapter_names, names)
                hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def _check_adapter_names(self, adapter_names: list[str], layers: list[nn.Module]) -> None:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call `model.eval()`.")
        known = {name for layer in layers if isinstance(layer, SparseLoraLayer) for name in layer.A}
        unknown = set(adapter_names) - known - {"__base__"}
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}. The model has "
                f"{', '.join(sorted(known))}."
            )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SparseLoraConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # PEFT calls this right before it saves the configuration, which needs the fingerprints then. Afterwards it
        # takes from `state_dict` a head that is adapted, and copies of modules.
        state_dict |= unmerged_weights(model, state_dict) | offloaded_values(model, cls.prefix, state_dict)
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        warn_of_unsaved(model, config, adapter_name, tensors)
        return proof_to_save(model, config, adapter_name, tensors)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SparseLoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # PEFT calls this with all tensors that are to be loaded, before it loads any of them.
        with names_alone():
            remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        whole = whole_pairs(model, adapter_name, remapped)
        return _by_every_name(model, receive(model, config, adapter_name, whole, wait=True))


def _has_adapter(module: nn.Module, adapter_name: str) -> bool:
    return isinstance(module, SparseLoraLayer) and adapter_name in module.A


def _by_every_name(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` by all names of their layers. A layer that the model holds twice is saved once."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SparseLoraLayer):
            names.setdefault(id(module), []).append(f"{name}.")
    found = dict(tensors)
    for first, *others in names.values():
        for key in [key for key in tensors if others and key.startswith(first)]:
            found |= {other + key.removeprefix(first): tensors[key] for other in others}
    return found


def _tied_weights(tuner: BaseTuner) -> set[int]:
    """Return what identifies the weights that modules share. The model is searched once for each new adapter."""
    known: set[int] | None = vars(tuner).get("_tied_weights")
    if known is None:
        parameters = (module._parameters.get("weight") for module in tuner.model.modules())
        counts = Counter(id(parameter) for parameter in parameters if parameter is not None)
        known = {identity for identity, count in counts.items() if count > 1}
        # A mixed model is a tuner of PEFT, which has no such attribute.
        tuner.__dict__["_tied_weights"] = known
    return known


def _with_adapter_names(names: list[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return args, kwargs | {"adapter_names": names}
