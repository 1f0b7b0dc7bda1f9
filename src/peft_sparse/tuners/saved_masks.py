"""The masks that are saved with adapters, in one adapted layer: several adapters on one base weight.

The zeros of the base weight are the mask of every adapter without a saved mask. An adapter with `save_mask` brings its
own mask M when it is loaded. These rules hold in each layer:

- The base weight is pruned to the entries that at least one adapter keeps, if every adapter of the model has a saved
  mask for the layer. Otherwise the base weight stays as it is, because another adapter may need its entries.
- An adapter whose M keeps fewer entries than the base weight then computes with M ⊙ W in the place of W.
- An adapter whose M keeps entries that are zero in the base weight is refused.

So every adapter computes what it computes alone, in whatever order they are loaded, used, saved and deleted.
`SparseLoraLayer` in `layer` is derived from `SavedMasks`.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from ..model.masks import (
    PROOF_BYTES,
    count_kept,
    decode_proof,
    encode_proof,
    fingerprint_of,
    mask_of,
    pack,
    sparsity_of,
    sparsity_of_fingerprint,
    underflowed,
    unpack,
)
from ..model.sharding import is_partitioned
from ..model.weights import stored_weight
from .base_weight import BaseWeight
from .config import SparseLoraConfig
from .functional import Weight


# A fraction of the entries of a weight. Dense checkpoints have a few zeros, so a weight with a smaller fraction of
# zeros does not count as pruned. Zeros that a saved mask keeps contradict the mask only above this fraction.
STRAY_ZEROS = 0.01

# What stands between a fingerprint and the formula of its adapter, among the tensors.
FORMULA = ";="

_names_alone: ContextVar[bool] = ContextVar("names_alone", default=False)


def is_in_memory(weight: Tensor) -> bool:
    """Return whether this process holds the values of the whole `weight`."""
    # ZeRO-3 empties the parameters it shards, and a DTensor holds one process's part. Weights on the meta device have
    # no values, and neither have those of a plan.
    return weight.numel() > 0 and not weight.is_meta and not isinstance(weight, (DTensor, FakeTensor))


def without_formula(proof: str) -> str:
    """Return a fingerprint as the configuration of an adapter holds it."""
    return proof.partition(FORMULA)[0]


def raise_or_warn(message: str, on_mismatch: str) -> None:
    """Tell of other zeros than expected, as `on_mask_mismatch` says, unless it is "ignore".

    Raises:
        ValueError: `on_mismatch` is "error".
    """
    if on_mismatch == "error":
        raise ValueError(message)
    if on_mismatch == "warn":
        warnings.warn(message, stacklevel=3)


@contextlib.contextmanager
def names_alone() -> Iterator[None]:
    """Let state dicts that are made within the context hold no fingerprints, because only their names are read."""
    token = _names_alone.set(True)
    try:
        yield
    finally:
        _names_alone.reset(token)


class SavedMasks(BaseWeight):
    """The base weight of one adapted layer, and the masks that are saved with its adapters.

    Args:
        base_layer: the layer to adapt, or another tuner's layer around it.
        quantization: what `peft.utils.get_quantization_kwargs` returns for the model.
    """

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__(base_layer, **quantization)
        for name in ("mask", "proof"):
            setattr(self, self.prefix + name, BufferDict(persistent=True))
        # The adapters whose saved mask was not yet compared with the base weight, with their `on_mask_mismatch`.
        self._unsettled: dict[str, str] = {}
        # The adapters whose tensors may bring a fingerprint that was not yet compared with the base weight.
        self._unproved: set[str] = set()
        # The fingerprints that differed from the base weight when they arrived. It may be pruned before the first use.
        self._awaited: dict[str, str] = {}
        # The adapters whose saved mask keeps fewer entries than the base weight has.
        self._narrower: set[str] = set()
        # The adapters whose mask could not be read off the base weight, so that it must be loaded.
        self._empty_masks: set[str] = set()
        # The configurations of all adapters of the model, by name. PEFT adds to this dict and deletes from it.
        self.all_adapters: Mapping[str, Any] = {}
        self.register_state_dict_post_hook(_write_proofs)

    @property
    def saved_masks(self) -> dict[str, Tensor]:
        """The packed masks, by name of the adapter. Only adapters with `save_mask` have one."""
        return getattr(self, f"{self.prefix}mask")

    @property
    def proofs(self) -> dict[str, Tensor]:
        """A place for the fingerprint of the mask of each adapter, as bytes: it carries them in state dicts.

        All bytes are 0 while there is nothing to compare.
        """
        return getattr(self, f"{self.prefix}proof")

    def pruned_weight(self, names: Sequence[str] = ()) -> Tensor:
        """Return the base weight before any merge, as a matrix (out, in). Its zeros are the mask.

        Args:
            names: the adapters that are to compute with it. Without names, the result is what the layer stores.

        Raises:
            ValueError: a saved mask contradicts the zeros of the base weight, or the adapters have different masks.
        """
        self.settle_masks()
        stored = self._stored_unmerged()
        if self._is_narrower(names):
            stored = stored.masked_fill(~self._common_mask(names, stored), 0)
        return self._matrix(stored)

    def kept_entries(self, name: str) -> Tensor:
        """Return the mask with which adapter `name` computes, laid out as the layer stores its weight."""
        self.settle_masks()
        stored = self._stored_unmerged()
        kept = mask_of(stored)
        return kept & self._saved_mask(name, stored) if name in self._narrower else kept

    def is_loaded(self) -> bool:
        """Return whether this process holds the whole base weight in memory, so that its zeros can be read."""
        return self._readable() and is_in_memory(self.read_weight())

    # -- masks that arrive and leave with an adapter -----------------------------------------------------------------

    def add_saved_mask(self, adapter_name: str, config: SparseLoraConfig) -> None:
        """Add buffers for what is saved with the adapter: its fingerprint, and its mask if `save_mask` asks for it.

        The mask is that of the base weight. If the base weight cannot be read, the buffer holds zeros until a saved
        mask is loaded.

        Args:
            adapter_name: name of the adapter.
            config: its configuration. If it comes from a saved adapter, loading replaces the mask.
        """
        self.forget_mask(adapter_name)
        self.proofs[adapter_name] = torch.zeros(PROOF_BYTES, dtype=torch.uint8)
        self._unproved.add(adapter_name)
        if not config.save_mask:
            return
        if self._readable():
            self.saved_masks[adapter_name] = pack(mask_of(self._stored_unmerged()))
        else:
            size = -(-self.out_features * self.in_features // 8)
            self.saved_masks[adapter_name] = torch.zeros(size, dtype=torch.uint8)
            self._empty_masks.add(adapter_name)
        if config.mask_fingerprints:
            # Only the configuration of a saved adapter has fingerprints.
            self._unsettled[adapter_name] = config.on_mask_mismatch

    def expect_mask(self, name: str, packed: Tensor, on_mismatch: str, proof: str = "") -> int:
        """Compare the mask that adapter `name` is about to receive with the base weight, and settle it at first use.

        Args:
            name: name of the adapter.
            packed: the packed mask.
            on_mismatch: `on_mask_mismatch` of its configuration.
            proof: the fingerprint that arrives with the mask, if there is one.

        Returns:
            How many entries that the mask keeps became zero when the base weight was cast to half precision.

        Raises:
            ValueError: the mask contradicts the zeros of the base weight, and `on_mismatch` is "error".
        """
        lost = 0
        if self.is_loaded() and not packed.is_meta:
            stored = self._stored_unmerged()
            mask = unpack(packed.to(stored.device), stored.shape)
            lost = self._check_contradiction(name, on_mismatch, stored, mask, proof)
            on_mismatch = "ignore" if lost else on_mismatch
        self._narrower.discard(name)
        self._unsettled[name] = on_mismatch
        return lost

    def expect_proof(self, name: str, proof: str) -> None:
        """Compare the fingerprint `proof` of adapter `name` with the base weight when the adapter is first used."""
        self._awaited[name] = proof
        self._unproved.add(name)

    def forget_proof(self, name: str) -> None:
        """Compare no fingerprint of adapter `name` at its first use: it is compared already."""
        self._awaited.pop(name, None)
        self._unproved.discard(name)

    @torch.no_grad()
    def proof_of(self, name: str) -> str:
        """Return the fingerprint of the mask with which adapter `name` computes, and update its saved mask.

        The base weight may have been pruned after the adapter was attached. Nothing is compared or settled: as long as
        a fingerprint or mask that arrived is not compared, that fingerprint is returned. The result is empty if the
        base weight cannot be read.
        """
        if any(tensor.is_meta for tensor in (self.proofs[name], *self.saved_masks.values())):
            return ""
        arrived = self._awaited.get(name) or (decode_proof(self.proofs[name]) if name in self._unproved else "")
        if arrived or name in self._unsettled or not self.is_loaded():
            return arrived
        stored = self._stored_unmerged()
        kept = stored.masked_fill(~self._saved_mask(name, stored), 0) if name in self._narrower else stored
        if name in self.saved_masks:
            self.saved_masks[name].copy_(pack(mask_of(kept)))
        return fingerprint_of(self._matrix(kept))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # `load_state_dict` of torch may bring other fingerprints and masks. They are compared at the first use.
        for name in self.proofs:
            proof = state_dict.get(f"{prefix}{self.prefix}proof.{name}")
            # Those that are empty were compared by the function that loads, or there was nothing to compare.
            if proof is not None and (proof.device.type != "cpu" or proof.any()):
                self._unproved.add(name)
            if f"{prefix}{self.prefix}mask.{name}" in state_dict and name in self.saved_masks:
                self._narrower.discard(name)
                self._unsettled.setdefault(name, self._on_mismatch(name))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forget_mask(self, name: str) -> None:
        """Forget what is known of the saved mask of adapter `name`."""
        self.forget_proof(name)
        for names in (self._narrower, self._empty_masks):
            names.discard(name)
        self._unsettled.pop(name, None)

    # -- the formula of an adapter -----------------------------------------------------------------------------------

    def formula_of(self, name: str) -> str:
        """Return how adapter `name` uses A and B, as a text: its trained scaling, `residual` and `masking`."""
        layer: Any = self
        return f"{layer.trained_scaling[name]!r},{int(layer.residual[name])},{layer.masking[name]}"

    def with_formula(self, name: str, proof: str) -> str:
        """Return the fingerprint `proof` of adapter `name` with its formula, if there is room for it."""
        both = f"{without_formula(proof)}{FORMULA}{self.formula_of(name)}"
        return both if proof and len(both) <= PROOF_BYTES else proof

    def check_formula(self, name: str, proof: str) -> None:
        """Check that adapter `name` computes with A and B as the adapter did whose fingerprint is `proof`.

        Raises:
            ValueError: it does not. Older adapters do not tell their formula.
        """
        told, here = proof.partition(FORMULA)[2], self.formula_of(name)
        if told and not _is_same_formula(told, here):
            raise ValueError(
                f"The tensors that adapter {name!r} receives were trained with another configuration: (scaling, "
                f"residual, masking) was {told}, and here it is {here}. Load them by `load_adapter` into a new name, "
                "which reads their configuration, or by `hotswap_adapter`."
            )

    # -- masks and the base weight -----------------------------------------------------------------------------------

    @torch.no_grad()
    def settle_masks(self, newcomer: SparseLoraConfig | None = None) -> None:
        """Compare what adapters brought with the base weight, and prune it where no adapter needs it.

        Args:
            newcomer: the configuration of an adapter that is not attached yet and does not count, although PEFT has
                added it to `all_adapters` already.

        Raises:
            ValueError: a saved mask or a fingerprint contradicts the zeros of the base weight.
        """
        if not (self._unsettled or self._unproved) or not self.is_loaded():
            return
        stored = self._stored_unmerged()
        # A fingerprint in a buffer can only be read by waiting for the device.
        if self._awaited or (self._unproved and not torch.compiler.is_compiling()):
            self._compare_proofs(stored)
        if not self._unsettled or any(mask.is_meta for mask in self.saved_masks.values()):
            return
        for name, on_mismatch in list(self._unsettled.items()):
            if name in self.saved_masks:
                mask, proof = self._saved_mask(name, stored), self.proofs[name]
                told = "" if proof.is_meta or on_mismatch == "ignore" else decode_proof(proof)
                self._check_contradiction(name, on_mismatch, stored, mask, told)
            del self._unsettled[name]
        kept = mask_of(stored)
        names = {name for name, config in self.all_adapters.items() if config is not newcomer} | set(self.proofs)
        # A merged weight is replaced when the adapters are unmerged, so it is not pruned.
        merged = self.merged_adapters or self._merged_beside()
        if not merged and all(name in self.saved_masks for name in names):
            needed = torch.zeros_like(kept)
            for name in names:
                needed |= self._saved_mask(name, stored)
            if bool((kept & ~needed).any()):
                self.write_weight(stored.masked_fill(~needed, 0))
                kept &= needed
        settled = [name for name in self.saved_masks if name not in self._empty_masks]
        self._narrower = {name for name in settled if bool((kept & ~self._saved_mask(name, stored)).any())}

    def _compare_proofs(self, stored: Tensor) -> None:
        """Compare the fingerprints that differed when they arrived, and those that nothing has compared."""
        for name in sorted(self._unproved):
            if name not in self.proofs:
                self.forget_proof(name)
                continue
            if not is_in_memory(self.proofs[name]):
                continue
            expected = self._awaited.get(name) or decode_proof(self.proofs[name])
            self.check_formula(name, expected)
            on_mismatch = self._on_mismatch(name)
            compared = expected and name not in self.saved_masks and on_mismatch != "ignore"
            if compared and underflowed(expected, self._matrix(stored)) is None:
                raise_or_warn(
                    f"Adapter {name!r} was trained on other zeros than this base model has: a weight of "
                    f"{self.out_features} x {self.in_features} has sparsity {sparsity_of(stored):.4f}, and in the "
                    f"adapter {sparsity_of_fingerprint(expected):.4f}. Load the pruned base model the adapter was "
                    "trained on.",
                    on_mismatch,
                )
            self.forget_proof(name)

    def _on_mismatch(self, name: str) -> str:
        return getattr(self.all_adapters.get(name), "on_mask_mismatch", "error")

    def _check_contradiction(self, name: str, on_mismatch: str, stored: Tensor, mask: Tensor, proof: str) -> int:
        """Check that the base weight holds the entries that `mask` keeps. Return how many a cast turned to 0."""
        missing = int(count_kept((stored == 0) & mask))
        stray = missing / stored.numel()
        if stray <= STRAY_ZEROS or on_mismatch == "ignore":
            return 0
        # A cast to half precision may have turned many small entries into zeros.
        if proof and underflowed(proof, self._matrix(stored.masked_fill(~mask, 0))) is not None:
            return missing
        raise_or_warn(
            f"Expected a base weight that is dense or has the zeros of adapter {name!r}. The mask saved with the "
            f"adapter keeps {stray:.1%} of the entries of this weight although they are zero. The mask has sparsity "
            f"{sparsity_of(mask):.4f}, and the base weight {sparsity_of(stored):.4f}. Load the adapter onto the dense "
            'model or onto the model it was trained on, or set `on_mask_mismatch="warn"`.',
            on_mismatch,
        )
        return 0

    def _is_narrower(self, names: Sequence[str]) -> bool:
        return any(name in self._narrower for name in names)

    def _saved_mask(self, name: str, stored: Tensor) -> Tensor:
        return unpack(self.saved_masks[name].to(stored.device), stored.shape)

    def _common_mask(self, names: Sequence[str], stored: Tensor) -> Tensor:
        """Return the saved mask of the adapters `names`, which must be one and the same."""
        narrow = next(name for name in names if name in self._narrower)
        for name in names:
            if name not in self.saved_masks or not torch.equal(self.saved_masks[name], self.saved_masks[narrow]):
                raise ValueError(
                    f"Adapters {narrow!r} and {name!r} have different masks, so that they cannot be active or merged "
                    "together. Choose one of them by `set_adapter`, or merge one of them."
                )
        return self._saved_mask(narrow, stored)

    def _weight_source(self, names: list[str]) -> Weight:
        """Return the base weight for `sparse_lora`, or a function that computes it where it is costly to keep."""
        if not self._readable():
            self._check_saved_mask(names[0])
            return partial(self._given_mask, names[0])
        self.settle_masks()
        partitioned = self.quantization_backend is None and is_partitioned(stored_weight(self.get_base_layer()))
        if self._trains_base():
            if partitioned:
                raise ValueError(
                    "A base weight that ZeRO-3 has split among processes is trained, and has an adapter. Its gradient "
                    "cannot be computed. Freeze the base weight, or leave its layer out of `target_modules`."
                )
            stored = stored_weight(self.get_base_layer())
            narrow = self._is_narrower(names)
            return self._matrix(stored.masked_fill(~self._common_mask(names, stored), 0) if narrow else stored)
        # A dequantised weight, one that ZeRO-3 gathered or a masked copy would stay in memory until backward.
        again = self.quantization_backend is not None or partitioned or self._is_narrower(names)
        return partial(self.pruned_weight, names) if again else self.pruned_weight(names)

    def _trains_base(self) -> bool:
        """Return whether autograd is to compute a gradient of the base weight, which the user has unfrozen."""
        if self.quantization_backend is not None or not torch.is_grad_enabled():
            return False
        return stored_weight(self.get_base_layer()).requires_grad

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


def _is_same_formula(one: str, other: str) -> bool:
    (scaling, *rest), (other_scaling, *other_rest) = one.split(","), other.split(",")
    # A scaling that was computed from another rank and another `lora_alpha` is rounded in another way.
    return rest == other_rest and math.isclose(float(scaling), float(other_scaling), rel_tol=1e-6)


def _write_proofs(layer: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Let the fingerprints of the masks travel in every state dict of an adapted layer."""
    if _names_alone.get():
        return
    for name, place in layer.proofs.items():
        # On the device of the other tensors, because processes exchange state dicts. A meta tensor would hold nothing.
        device = "cpu" if place.is_meta else place.device
        proof = layer.with_formula(name, layer.proof_of(name))
        state_dict[f"{prefix}{layer.prefix}proof.{name}"] = encode_proof(proof).to(device)
