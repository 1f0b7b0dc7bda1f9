"""Fingerprints of the masks: saved with an adapter, and compared with the model that the adapter is loaded onto.

They are saved twice: in the configuration, so that a wrong base is refused before the adapter is attached, and among
the tensors, so that every other way in has them too: an adapter that exists already, a bare state dict, a hotswap, a
resumed run. `model` calls these functions when PEFT attaches, saves or loads an adapter.
"""

import logging
import warnings

from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..model.blocks import base_layer, base_model
from ..model.cpu_packing import is_repacked_when_run, undo_cpu_packing
from ..model.environment import remembered
from ..model.experts import fused_experts
from ..model.masks import (
    count_kept,
    decode_proof,
    encode_proof,
    sparsity_of,
    sparsity_of_fingerprint,
    underflowed,
)
from ..model.offload import is_offloaded, loaded_layer
from ..model.sharding import has_shards, whole
from ..model.tree import is_prunable, walk
from ..model.weights import PRUNABLE_LAYERS, as_matrix
from .config import SparseLoraConfig
from .factors import layers_with
from .layer import SparseLoraLayer
from .saved_masks import STRAY_ZEROS, is_in_memory, raise_or_warn, without_formula


logger = logging.getLogger(__name__)


def fingerprints(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Return the fingerprint of the mask of every weight that the adapter adapts, by name of the layer or parameter.

    The masks that are saved with the adapter are updated too. Sharded weights are gathered, so all processes must call
    the function together.
    """
    found = {}
    for key, module in layers_with(model, adapter_name).items():
        with whole(module):
            module.settle_masks()
            if proof := module.proof_of(adapter_name):
                found[key] = proof
    return found


def remember_proof(model: nn.Module) -> None:
    """Compute the fingerprints of sharded weights now, for a later save.

    One process saves alone and cannot gather sharded weights then. All processes must call this function together. It
    does nothing for a model without shards.

    Args:
        model: the model with adapters.
    """
    if has_shards(model):
        for name, config in getattr(model, "peft_config", {}).items():
            if isinstance(config, SparseLoraConfig):
                config._proof = fingerprints(model, name)


def proof_to_save(
    model: nn.Module, config: SparseLoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return `state_dict` with the fingerprints of the masks among its tensors, and note them in `config`.

    The fingerprints of a sharded model are those that `remember_proof` computed.

    Args:
        model: the model with adapters.
        config: configuration of the adapter.
        adapter_name: name of the adapter.
        state_dict: the tensors of the adapter, by the names they have in `model.state_dict()`.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    keys = {
        key: f"{paths[id(module)]}.{module.prefix}proof.{adapter_name}"
        for key, module in layers_with(model, adapter_name).items()
    }
    config._done = remembered(model)
    if not has_shards(model):
        # `state_dict` of the layers has computed them. It is empty for a weight that cannot be read.
        told = {key: decode_proof(state_dict[proof]) for key, proof in keys.items() if proof in state_dict}
        if len(told) < len(keys):
            told = fingerprints(model, adapter_name)
        for key, module in layers_with(model, adapter_name).items():
            if not told.get(key) and is_offloaded(module.get_base_layer()):
                with loaded_layer(module.get_base_layer()):
                    told[key] = module.proof_of(adapter_name)
        config._proof = {key: without_formula(proof) for key, proof in told.items() if proof}
        config._others = other_sparsities(model, adapter_name)
    elif not config._proof:
        warnings.warn(
            f"Adapter {adapter_name!r} is saved without fingerprints of its masks. The base weights are sharded over "
            "processes, and the process that saves cannot read them. Train with SparseTrainer or add "
            "ZeroGuardCallback, which compute the fingerprints before saving.",
            stacklevel=2,
        )
    layers = layers_with(model, adapter_name)
    proofs = {
        proof: encode_proof(layers[key].with_formula(adapter_name, config._proof.get(key, "")))
        for key, proof in keys.items()
    }
    return state_dict | {key: proof for key, proof in proofs.items() if key in state_dict}


def receive(
    model: nn.Module,
    config: SparseLoraConfig,
    adapter_name: str,
    state_dict: dict[str, Tensor],
    *,
    wait: bool = False,
) -> dict[str, Tensor]:
    """Compare the fingerprints and masks that arrive with an adapter's tensors with the base weights.

    Every door by which tensors come into an adapter ends here, before a tensor of the model changes.

    Args:
        model: the model with adapters.
        config: configuration of the adapter, with `on_mask_mismatch`.
        adapter_name: name of the adapter.
        state_dict: the tensors that arrive, by the names they have in `model.state_dict()`.
        wait: whether an error about other zeros is raised at the first use of the adapter, and not now. A Trainer that
            resumes loads the adapter before a callback prunes the base weights.

    Returns:
        `state_dict` with empty fingerprints. They have been compared and are computed anew when the adapter is saved.

    Raises:
        ValueError: the zeros differ and `on_mask_mismatch` is "error", or a saved mask needs entries that are zero in
            the base weight. With "warn" the function warns. Or the tensors were trained with another scaling,
            `residual` or `masking`.
    """
    received = dict(state_dict)
    # `check_masks` has compared these right before the adapter was attached.
    compared, config._compared = config._compared, {}
    paths = {id(module): path for path, module in model.named_modules()}
    expected: dict[str, tuple[str, Tensor]] = {}
    lost: dict[str, int] = {}
    for key, module in layers_with(model, adapter_name).items():
        path = paths[id(module)]
        proof = f"{path}.{module.prefix}proof.{adapter_name}"
        mask = received.get(f"{path}.{module.prefix}mask.{adapter_name}")
        told = decode_proof(received[proof]) if proof in received else ""
        if wait:
            # A hotswap gives the layer the formula of the new adapter.
            module.check_formula(adapter_name, told)
        told = without_formula(told)
        received[proof] = encode_proof("")
        module.forget_proof(adapter_name)
        if mask is not None and (config.save_mask or adapter_name in module.saved_masks):
            lost[key] = module.expect_mask(adapter_name, mask, config.on_mask_mismatch, told)
        elif told and told != compared.get(key) and module.is_loaded():
            weight = module.pruned_weight()
            if wait and config.on_mask_mismatch == "error" and underflowed(told, weight) is None:
                module.expect_proof(adapter_name, told)
            else:
                expected[key] = told, weight
    _compare(expected, config.on_mask_mismatch)
    _tell_lost(lost)
    return received


def report_oddities(model: nn.Module, config: SparseLoraConfig, adapter_name: str) -> None:
    """Log a warning if weights with a MaskLoRA adapter are not pruned, are all zero, or if `r` exceeds their rank."""
    dense, empty, excessive, count = [], [], [], 0
    for name, module in layers_with(model, adapter_name).items():
        if not module.is_loaded():
            continue
        weight = module.read_weight()
        count += 1
        kept = int(count_kept(weight))
        if kept > (1 - STRAY_ZEROS) * weight.numel():
            dense.append(name)
        elif not kept:
            empty.append(name)
        if module.r[adapter_name] > min(module._matrix(weight).shape[-2:]):
            excessive.append(name)
    if dense and config.name == "mask_lora":
        logger.warning(
            "%d of %d adapted weights are not pruned (first %r). MaskLoRA is plain LoRA there until they are pruned.",
            len(dense),
            count,
            dense[0],
        )
    if empty:
        logger.warning(
            "%d of %d adapted weights consist of zeros (first %r). They stay zero, so that an adapter has no effect "
            "there. Load the weights first, or leave these layers out of `target_modules`.",
            len(empty),
            count,
            empty[0],
        )
    if excessive:
        logger.warning(
            "`r` exceeds the full rank of %d adapted weights (first %r): a smaller rank can express every update of "
            "them. Lower `r`, or set `rank_pattern` for these layers.",
            len(excessive),
            excessive[0],
        )


def check_masks(model: nn.Module, config: SparseLoraConfig) -> None:
    """Compare the zeros of `model` with the fingerprints in `config`, before an adapter is attached.

    An adapter with `save_mask` may have more zeros than the model. Its mask is compared when it arrives.

    Args:
        model: the base model.
        config: configuration of the adapter, with `on_mask_mismatch`.

    Raises:
        ValueError: the zeros differ and `on_mask_mismatch` is "error". With "warn" the function warns.
    """
    brings_masks = config.save_mask and bool(config.mask_fingerprints)
    check_other_weights(model, config)
    for module in model.modules():
        if isinstance(module, SparseLoraLayer) and not brings_masks:
            # The new adapter computes with the zeros that the base weight has once the others are settled.
            module.settle_masks(config)
    if config.on_mask_mismatch == "ignore" or not config.mask_fingerprints:
        return
    modules = dict(model.named_modules())
    weights = {name: _weight_called(model, modules, name) for name in config.mask_fingerprints}
    expected = {n: (p, w) for n, p in config.mask_fingerprints.items() if (w := weights[n]) is not None}
    if config.save_mask:
        # A mask cannot be that of a base weight with more zeros.
        expected = {
            n: (p, w) for n, (p, w) in expected.items() if sparsity_of(w) > sparsity_of_fingerprint(p) + STRAY_ZEROS
        }
    _compare(expected, config.on_mask_mismatch)
    config._compared = {} if config.save_mask else {name: proof for name, (proof, _) in expected.items()}


def check_other_weights(model: nn.Module, config: SparseLoraConfig) -> None:
    """Check that the weights that the adapter does not adapt are as sparse as those it was trained beside.

    A cast and quantising may add zeros, so that more zeros are accepted.

    Args:
        model: the base model.
        config: configuration of the adapter, with `on_mask_mismatch`.

    Raises:
        ValueError: a weight has fewer zeros and `on_mask_mismatch` is "error". With "warn" the function warns.
    """
    if config.on_mask_mismatch == "ignore" or not config.other_sparsities:
        return
    modules = dict(model.named_modules())
    found = {name: _weight_beside(model, modules, name) for name in config.other_sparsities}
    here = {name: sparsity_of(weight) for name, weight in found.items() if weight is not None}
    denser = [name for name, share in here.items() if share < config.other_sparsities[name] - STRAY_ZEROS]
    if denser:
        name = denser[0]
        raise_or_warn(
            f"The adapter was trained beside weights that it does not adapt and that are pruned. {len(denser)} of "
            f"{len(config.other_sparsities)} have fewer zeros in this base model, such as {name!r}: sparsity "
            f"{here[name]:.4f}, where it was {config.other_sparsities[name]:.4f}. Load the pruned base model the "
            'adapter was trained on, or pass a configuration with `on_mask_mismatch="warn"`.',
            config.on_mask_mismatch,
        )


def other_sparsities(model: nn.Module, adapter_name: str) -> dict[str, float]:
    """Return the sparsity of every pruned weight that the adapter does not adapt, by the name of its layer."""
    base, adapted = base_model(model), layers_with(model, adapter_name)
    modules = dict(base.named_modules())
    # Copies of whole modules are saved with their zeros.
    layers = [name for name, module in walk("", base) if is_prunable(module)]
    names = [name for name in layers if not isinstance(modules.get(name), AuxiliaryTrainingWrapper)]
    found = {}
    for name in [*names, *(fused_experts(base) if names else ())]:
        weight = None if name in adapted else _weight_beside(base, modules, name)
        if weight is not None and (share := sparsity_of(weight)) > STRAY_ZEROS:
            found[name] = round(share, 4)
    return found


def _compare(expected: dict[str, tuple[str, Tensor]], on_mismatch: str) -> None:
    """Compare fingerprints with weights, (fingerprint, weight as a matrix) by name."""
    if on_mismatch == "ignore":
        return
    counts = {name: underflowed(proof, weight) for name, (proof, weight) in expected.items()}
    differing = [name for name, count in counts.items() if count is None]
    _tell_lost({name: count or 0 for name, count in counts.items()})
    if not differing:
        return
    examples = "; ".join(
        f"{name}: adapter {sparsity_of_fingerprint(expected[name][0]):.4f}, model {sparsity_of(expected[name][1]):.4f}"
        for name in differing[:3]
    )
    raise_or_warn(
        f"The adapter was trained on other zeros than this base model has, in {len(differing)} of {len(expected)} "
        f"layers (sparsities: {examples}). Load the pruned base model the adapter was trained on, or pass a "
        'configuration with `on_mask_mismatch="warn"` to use the zeros of this base model.',
        on_mismatch,
    )


def _tell_lost(counts: dict[str, int]) -> None:
    """Log one warning if entries became zero when the base model was cast to half precision."""
    lost = {name: count for name, count in counts.items() if count}
    if lost:
        logger.warning(
            "%d entries that the adapter was trained on are too small for the dtype of this base model and are zero "
            "in it, in %d weights (first %r). The adapter leaves them zero.",
            sum(lost.values()),
            len(lost),
            next(iter(lost)),
        )


def _weight_beside(model: nn.Module, modules: dict[str, nn.Module], name: str) -> Tensor | None:
    """Return the weight of the layer or parameter `name`, which has no adapter, as a matrix.

    The layer does not change. None if the weight is missing, or cannot be read without a change of the layer.
    """
    if name in modules and is_repacked_when_run(base_layer(modules[name])):
        # To read such a weight changes how the layer computes from then on.
        return None
    return _weight_called(model, modules, name)


def _weight_called(model: nn.Module, modules: dict[str, nn.Module], name: str) -> Tensor | None:
    """Return the weight of the layer or parameter `name` as a matrix. None if it is missing or cannot be read."""
    module = modules.get(name)
    if module is None:
        owner, _, parameter = name.rpartition(".")
        return _parameter_called(modules[owner], parameter) if owner in modules else None
    if isinstance(module, SparseLoraLayer):
        return module.pruned_weight() if module.is_loaded() else None
    layer = base_layer(module)
    backend = resolve_quantization_backend(layer, **get_quantization_kwargs(model))
    if backend is not None:
        undo_cpu_packing(layer)
        return backend.get_base_weight(layer) if backend.supports_merge else None
    if not isinstance(layer, PRUNABLE_LAYERS) or not is_in_memory(layer.weight):
        return None
    return as_matrix(layer, layer.weight.detach())


def _parameter_called(owner: nn.Module, parameter: str) -> Tensor | None:
    while isinstance(owner, SparseLoraLayer):
        if getattr(owner, "parameter_name", None) == parameter:
            return owner.pruned_weight() if owner.is_loaded() else None
        owner = owner.base_layer
    weight = getattr(owner, parameter, None)
    if not isinstance(weight, Tensor) or not is_in_memory(weight):
        return None
    transposed = weight.dim() == 3 and getattr(owner, "is_transposed", False)
    return weight.detach().mT if transposed else weight.detach()
