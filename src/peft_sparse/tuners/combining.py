"""`add_weighted_adapter`: one adapter that computes the weighted sum of others.

`SparseLoraModel` in `model` has the method. Adapter i has the weight w_i and the scaling s_i. The sum is exact,
because H is the same for all of them: Σ w_i s_i H ⊙ (B_i A_i) is H ⊙ (BA) with stacked factors. A ScaledLoRA adapter
with `residual=False` adds s_i W ⊙ (B_i A_i - 1). The combination is residual, and such adapters give it one more rank,
which holds minus the sum of their w_i s_i everywhere.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, ties
from torch import Tensor

from ..model.masks import pack
from ..model.weights import stored_weight
from .config import SparseLoraConfig
from .factors import (
    by_expert,
    check_adapter_name,
    experts_of,
    factors_of,
    layers_with,
    stored,
    trained_whole,
    write_ranks,
)
from .layer import SparseLoraLayer


# They merge matrices. An SVD then gives A and B of the merged matrix.
DENSE = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
KINDS = ("cat", "svd", *DENSE)
# PEFT applies these to A and B apart, which does not give the sum of the products BA.
APART = {"linear": "cat"} | {kind.removesuffix("_svd"): kind for kind in DENSE}
TARGETS = (
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "layers_to_transform",
    "layers_pattern",
    "train_head",
)


@dataclass(frozen=True)
class Combination:
    """How adapters are combined, in the words of PEFT's `add_weighted_adapter`."""

    kind: str
    svd_rank: int | None
    svd_clamp: float | None
    svd_driver: str | None
    density: float | None
    majority_sign_method: Literal["total", "frequency"]

    def check(self, adapters: int) -> None:
        """Refuse values that have no meaning. `adapters` is the number of adapters."""
        if self.kind in APART and (self.kind != "linear" or adapters > 1):
            raise ValueError(
                f"`combination_type` {self.kind!r} combines A and B apart, which is not the sum of the updates. Use "
                f"{APART[self.kind]!r}."
            )
        if self.kind not in (*KINDS, "linear"):
            raise ValueError(f"`combination_type` must be one of {KINDS}, got {self.kind!r}.")
        if self.kind in DENSE and not (self.density is not None and 0 < self.density <= 1):
            raise ValueError(
                f"`density` must be in (0, 1] for `combination_type` {self.kind!r}, got {self.density}. It is the "
                "fraction of entries of each update that is kept."
            )
        if self.majority_sign_method not in ("total", "frequency"):
            raise ValueError(
                f"`majority_sign_method` must be 'total' or 'frequency', got {self.majority_sign_method!r}."
            )
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ValueError(f"`svd_rank` must be a positive integer, got {self.svd_rank!r}.")
        if self.svd_clamp is not None and not 0 <= self.svd_clamp <= 1:
            raise ValueError(f"`svd_clamp` must be a quantile in [0, 1], got {self.svd_clamp!r}.")

    def merge(self, updates: list[Tensor], weights: Tensor) -> Tensor:
        """Return the update that one of `DENSE` makes of several."""
        signs = {"majority_sign_method": self.majority_sign_method}
        if self.kind == "ties_svd":
            return ties(updates, weights, self.density, **signs)
        if self.kind == "dare_ties_svd":
            return dare_ties(updates, weights, self.density, **signs)
        return (dare_linear if self.kind == "dare_linear_svd" else magnitude_prune)(updates, weights, self.density)


@torch.no_grad()
def combine(model: Any, adapters: Sequence[str], weights: Sequence[float], name: str, how: Combination) -> None:
    """Add the adapter `name`, which combines others, to a `SparseLoraModel`. The active adapters stay active.

    Args:
        model: the model.
        adapters: names of the adapters.
        weights: their weights.
        name: name of the new adapter.
        how: how they are combined.

    Raises:
        ValueError: the adapters cannot be combined in this way. The model is as before.
    """
    _check(model, adapters, weights, name, how)
    found = {adapter: layers_with(model, adapter) for adapter in adapters}
    layers = {key: layer for of_adapter in found.values() for key, layer in of_adapter.items()}
    masks = {key: _common_mask(key, layer, adapters) for key, layer in layers.items()}
    factors = {key: _combined(layer, adapters, weights, how) for key, layer in layers.items()}
    model.peft_config[name] = _new_config([model.peft_config[adapter] for adapter in adapters], layers, factors)
    try:
        model.inject_adapter(model.model, name)
    except Exception:
        del model.peft_config[name]
        raise
    for key, layer in layers.items():
        for module, factor in zip((layer.A[name], layer.B[name]), factors[key], strict=True):
            weight = stored_weight(module)
            weight.data = factor.to(weight.device)
        mask = masks[key]
        if mask is not None and name in layer.saved_masks:
            layer.saved_masks[name].copy_(mask)
            layer._unsettled[name] = "error"


def _check(model: Any, adapters: Sequence[str], weights: Sequence[float], name: str, how: Combination) -> None:
    if not adapters or len(adapters) != len(weights) or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(
            "Expected one finite weight for each adapter, and at least one adapter. Got the adapters "
            f"{list(adapters)} and the weights {list(weights)}."
        )
    known = model.peft_config
    unknown = sorted(set(adapters) - set(known))
    if unknown:
        raise ValueError(f"The model has no adapter {unknown[0]!r}. It has {', '.join(sorted(known))}.")
    if name in known:
        raise ValueError(f"The model has an adapter {name!r} already. Choose another name, or delete it first.")
    check_adapter_name(name)
    how.check(len(adapters))
    configs = [known[adapter] for adapter in adapters]
    if len({getattr(config, "masking", "always") for config in configs}) > 1:
        raise ValueError(
            'Expected adapters of the same `masking`, got "always" and "merge". Their forward passes differ. Combine '
            "adapters of one kind."
        )
    for adapter, config in zip(adapters, configs, strict=True):
        field = trained_whole(config)
        if field is not None:
            raise ValueError(
                f"Adapters are combined by their A and B. Adapter {adapter!r} also trains whole parameters, by "
                f"`{field}`. Merge it by `merge_and_unload()` instead."
            )


def _combined(
    layer: SparseLoraLayer, adapters: Sequence[str], weights: Sequence[float], how: Combination
) -> tuple[Tensor, Tensor]:
    """Return A and B of the combination, as the layer stores them. Its scaling is 1."""
    present = [
        (adapter, float(weight)) for adapter, weight in zip(adapters, weights, strict=True) if adapter in layer.A
    ]
    scales = [float(layer.scaling[adapter]) for adapter, _ in present]
    pairs = [factors_of(layer, adapter) for adapter, _ in present]
    if any(A.is_meta or A.numel() == 0 for A, _ in pairs):
        raise ValueError(
            "Expected adapters whose A and B are in the memory of this process. They are on the meta device, or "
            "sharded over processes. Load the adapters in one process and combine them there."
        )
    dtype = pairs[0][0].dtype
    for A, _ in pairs[1:]:
        dtype = torch.promote_types(dtype, A.dtype)
    # Half precision would round the sums, and has no SVD.
    exact = torch.promote_types(dtype, torch.float32)
    pairs = [by_expert(A.to(exact), B.to(exact), experts_of(layer)) for A, B in pairs]
    ones = [float(not layer.residual[adapter]) for adapter, _ in present]
    rank = (how.svd_rank or max(A.shape[1] for A, _ in pairs)) + any(ones)
    if how.kind in DENSE:
        updates = [s * (B @ A - one) for (A, B), s, one in zip(pairs, scales, ones, strict=True)]
        given = torch.tensor([weight for _, weight in present], dtype=exact, device=updates[0].device)
        merged = torch.stack([how.merge(list(of_expert), given) for of_expert in zip(*updates, strict=True)])
        A, B = _truncated(merged, rank, how)
    else:
        shares = [weight * s for (_, weight), s in zip(present, scales, strict=True)]
        A, B = _stacked(pairs, shares, -sum(share * one for share, one in zip(shares, ones, strict=True)))
        if how.kind == "svd":
            # BA = Q_B (R_B R_A^T) Q_A^T, and Q has orthonormal columns. So the SVD of a small matrix gives that of BA.
            (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.mT)
            A, B = _truncated(R_B @ R_A.mT, rank, how, Q_B, Q_A)
    A, B = stored(A, B)
    return A.to(dtype).contiguous(), B.to(dtype).contiguous()


def _stacked(pairs: list[tuple[Tensor, Tensor]], shares: list[float], constant: float) -> tuple[Tensor, Tensor]:
    """Return A and B of the weighted sum, plus one rank that holds `constant` everywhere if it is not 0."""
    A = torch.cat([A for A, _ in pairs], 1)
    B = torch.cat([B * share for (_, B), share in zip(pairs, shares, strict=True)], 2)
    if not constant:
        return A, B
    return torch.cat([A, torch.ones_like(A[:, :1])], 1), torch.cat([B, torch.full_like(B[:, :, :1], constant)], 2)


def _truncated(
    matrix: Tensor, rank: int, how: Combination, left: Tensor | None = None, right: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return A and B of the best approximation of left @ matrix @ right^T (experts, out, in) that has this rank."""
    driver = how.svd_driver if matrix.is_cuda else None
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False, driver=driver)
    B, A = U[..., :rank] * S[..., None, :rank], Vh[..., :rank, :]
    B, A = B if left is None else left @ B, A if right is None else A @ right.mT
    if how.svd_clamp is not None:
        limit = float(torch.quantile(torch.cat([B.flatten(), A.flatten()]), how.svd_clamp))
        B, A = B.clamp(-limit, limit), A.clamp(-limit, limit)
    return A, B


def _common_mask(key: str, layer: SparseLoraLayer, adapters: Sequence[str]) -> Tensor | None:
    """Return the packed mask with which all adapters of the layer compute. None if none of them has a saved mask."""
    present = [adapter for adapter in adapters if adapter in layer.A]
    saved = [adapter for adapter in present if adapter in layer.saved_masks]
    if not saved:
        return None
    if layer.is_loaded():
        masks = [pack(layer.kept_entries(adapter)) for adapter in present]
    else:
        masks = [layer.saved_masks[adapter] for adapter in saved]
    if any(not torch.equal(mask, masks[0]) for mask in masks[1:]):
        raise ValueError(
            f"The adapters have different masks in {key!r}, so that no adapter with one mask computes their sum. "
            "Combine adapters that were trained on the same zeros."
        )
    return masks[0]


def _new_config(
    configs: list[Any], layers: dict[str, SparseLoraLayer], factors: dict[str, tuple[Tensor, Tensor]]
) -> SparseLoraConfig:
    first = configs[0]
    config = replace(
        first,
        use_rslora=False,
        lora_dropout=min(one.lora_dropout for one in configs),
        init_weights=True,
        save_mask=any(one.save_mask for one in configs),
        mask_fingerprints={},
        other_sparsities={},
        inference_mode=True,
        rank_pattern={},
        alpha_pattern={},
    )
    if any(getattr(one, field) != getattr(first, field) for one in configs for field in TARGETS):
        modules = [re.escape(key) for key, layer in layers.items() if not hasattr(layer, "parameter_name")]
        parameters = next((one.target_parameters for one in configs if one.target_parameters), None)
        changes = dict.fromkeys(TARGETS) | {"target_parameters": parameters, "train_head": "none"}
        config = replace(config, **changes | {"target_modules": "|".join(modules) if modules else []})
    if hasattr(config, "residual"):
        config.residual = True
    ranks = {key: A.shape[0] // experts_of(layers[key]) for key, (A, _) in factors.items()}
    write_ranks(config, ranks, {key: float(rank) for key, rank in ranks.items()})
    return config
