"""Every refusal of `tuners/`, with its words."""

import tempfile

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from accelerate import cpu_offload
from peft import (
    AdaptionPromptConfig,
    LoraConfig,
    OFTConfig,
    PeftMixedModel,
    PrefixTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import ArrowConfig, LoraLayer, create_arrow_model
from peft.utils import hotswap
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, MambaConfig

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, keep_effective_weights, prune
from peft_sparse.model.masks import pack
from peft_sparse.tuners import MaskLoraModel, merged_state_dict
from peft_sparse.tuners.proof import check_masks
from peft_sparse.tuners.registration import register

from conftest import CONFIGS, tiny
from refusing import TOKENS, adapted, llama, merged


def headless():
    return AutoModel.from_config(CONFIGS["llama"])


def unreadable():
    model = adapted()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.quantization_backend = ForwardOnlyQuantizationBackend("stub")
    model(TOKENS)


def attention(change=lambda model: model, **options):
    class Attention(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    model = get_peft_model(nn.Sequential(Attention(8, 2)), MaskLoRAConfig(target_modules=["out_proj"])).eval()
    change(model)(torch.randn(2, 3, 8), **options)


def computed_later():
    model = adapted()
    nn.utils.parametrizations.weight_norm(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer)
    merged_state_dict(model, merge=False)  # this needs no merged weight
    with pytest.raises(ValueError, match="q_proj' is computed from other parameters"):
        merged_state_dict(model)
    model.merge_and_unload()


def quantised_later():
    class Packed(nn.Module):
        def weight(self):
            """As torch's quantised layers have it."""

    model = adapted()
    model.base_model.model.model.layers[0].mlp.up_proj.base_layer = Packed()
    model(TOKENS)


def received_by_another_scaling():
    state = get_peft_model_state_dict(adapted())
    set_peft_model_state_dict(adapted(lora_alpha=64), state)


def adapted_by(config):
    model = llama()
    prune(model, 0.5)
    return get_peft_model(model, config)


def unreadable_merge():
    model = adapted()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.quantization_backend = ForwardOnlyQuantizationBackend("stub")
    merged_state_dict(model, merge=False)  # this needs no weight
    merged_state_dict(model)


def sharded_codes():
    model = adapted()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.quantization_backend = ForwardOnlyQuantizationBackend("stub")
    layer.base_layer.weight.ds_tensor = torch.zeros(1)
    merged_state_dict(model, merge=False)


def mixed_methods():
    model = PeftMixedModel(llama(), MaskLoRAConfig(target_modules=["q_proj"]), "one")
    model.add_adapter("two", OFTConfig(target_modules=["q_proj"], oft_block_size=4))
    model.set_adapter(["one", "two"])
    merged_state_dict(model)


def other_proof():
    model = adapted()
    state = get_peft_model_state_dict(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.get_base_layer().weight[:, 0] = 0
    set_peft_model_state_dict(model, state)
    model(TOKENS)


def other_masks():
    model = adapted()
    for name, share in (("first", 0.5), ("other", 0.8)):
        config = MaskLoRAConfig(target_modules=["up_proj"], save_mask=True)
        model.add_adapter(name, config)
        for layer in model.base_model.model.model.layers:
            weight = layer.mlp.up_proj.get_base_layer().weight
            mask = weight.abs() > weight.abs().flatten().quantile(share)
            layer.mlp.up_proj.expect_mask(name, pack(mask), "error")
            layer.mlp.up_proj.saved_masks[name].copy_(pack(mask))
    model.base_model.set_adapter(["first", "other"])
    model(TOKENS)


def trained_base_of_zero3():
    model = adapted()
    weight = model.base_model.model.model.layers[0].mlp.up_proj.get_base_layer().weight.requires_grad_()
    weight.ds_tensor = torch.zeros(1)
    model(TOKENS)


def foreign_mask():
    one = nn.Sequential(nn.Linear(4, 4))
    one[0].weight.data = 1.0 - torch.eye(4)
    model = get_peft_model(
        one, MaskLoRAConfig(target_modules=["0"], save_mask=True, mask_fingerprints={"0": "4x4:8:0"})
    )
    model.base_model.model[0].saved_masks["default"].fill_(255)
    model(torch.ones(1, 4))


def experts(**options):
    return get_peft_model(
        tiny("mixtral"), MaskLoRAConfig(target_modules=[], target_parameters=["gate_up_proj"], **options)
    )


def other_parameters():
    experts().add_adapter("other", MaskLoRAConfig(target_modules=[], target_parameters=["down_proj"]))


def mamba():
    config = MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4)
    get_peft_model(AutoModelForCausalLM.from_config(config), MaskLoRAConfig(target_modules=["out_proj"]))


def vector_parameter():
    get_peft_model(llama(), MaskLoRAConfig(target_modules=[], target_parameters=["input_layernorm.weight"]))


def nan_adapter():
    model = get_peft_model(llama(), MaskLoRAConfig(target_modules="all-linear"))
    nn.init.constant_(model.base_model.model.model.layers[0].mlp.up_proj.mask_lora_B.default.weight, torch.nan)
    return model


class ForeignConfig:
    """Stands for another package's method of the same name."""


def mismatch():
    config = MaskLoRAConfig(mask_fingerprints={"lm_head": "61x16:500:0000000000000000"})
    check_masks(llama(), config)


def offloaded():
    model = adapted()
    cpu_offload(model, execution_device=torch.device("cpu"))
    model(input_ids=TOKENS)


def attached_after_offloading():
    model = llama()
    cpu_offload(model, execution_device=torch.device("cpu"))
    with torch.no_grad():
        adapted(model)(input_ids=TOKENS)


def with_masks_not_removed():
    model = llama()
    torch_prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5)
    adapted(model)


def swap(model, other=None, drop=None, **changes):
    """Swap the adapter of `other` into `model`, without the tensors whose names hold `drop`."""
    other = other or adapted(**changes)
    state = {key: value for key, value in get_peft_model_state_dict(other).items() if not drop or drop not in key}
    state = hotswap._insert_adapter_name_into_state_dict(state, "default", "mask_lora_")
    hotswap.hotswap_adapter_from_state_dict(model, state, "default", other.peft_config["default"], "mask_lora_")


def merged_by_lora_first():
    model = adapted_by(LoraConfig(target_modules=["q_proj"]))
    lora = [module for module in model.modules() if isinstance(module, LoraLayer)]
    with pytest.warns(UserWarning, match="for a second time|multiple adapters"):
        outer = get_peft_model(model, MaskLoRAConfig(target_modules=["q_proj"]))
    for layer in lora:
        layer.merge()
    outer.merge_adapter()


def lora_merged_beside():
    model = PeftMixedModel(llama(), MaskLoRAConfig(target_modules=["q_proj"]), "mask")
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter(["mask", "lora"])
    model.base_model.merge_adapter(["lora"])


def pruned_beside():
    get_peft_model(llama(), MaskLoRAConfig(target_modules=["q_proj"], other_sparsities={"lm_head": 0.5}))


def transformers_hotswap():
    model = llama()
    model.add_adapter(MaskLoRAConfig(target_modules=["q_proj"]))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.load_adapter(folder, "default", hotswap=True)


def prepared(**options):
    hotswap.prepare_model_for_compiled_hotswap(adapted(), **options)


def prepared_late():
    hotswap.prepare_model_for_compiled_hotswap(torch.compile(adapted(), backend="eager"), target_rank=16)


def arrow():
    with tempfile.TemporaryDirectory() as folder:
        adapted().save_pretrained(folder)
        create_arrow_model(llama(), [folder, folder], ArrowConfig())


def tied_head():
    get_peft_model(tiny("gpt2"), MaskLoRAConfig(target_modules=["lm_head"], ensure_weight_tying=True))


def narrow(layer):
    layer.saved_masks["default"].zero_()
    layer._unsettled["default"] = "error"


def combined(
    adapters=("default", "second"), weights=(1.0, 1.0), name="sum", edit=None, first=(), second=(), **options
):
    model = adapted(**dict(first))
    model.add_adapter("second", MaskLoRAConfig(target_modules="all-linear", **dict(second)))
    if edit is not None:
        edit(model.base_model.model.model.layers[0].mlp.up_proj)
    model.add_weighted_adapter(list(adapters), list(weights), name, **options)


REFUSALS = [
    (
        lambda: keep_effective_weights(adapted(), training_bytes=-1),
        ValueError,
        r"`training_bytes` must not be negative, got -1. Use 0",
    ),
    (arrow, TypeError, "Arrow routes among LoRA adapters, got one with layers of type MaskLoraLinear. Train"),
    (
        lambda: adapted().subtract_mutated_init({}, "default"),
        AttributeError,
        "MaskLoraModel has no `subtract_mutated_init`. It belongs to initialisations and variants of LoRA",
    ),
    (tied_head, ValueError, "cannot tie an adapter on 'lm_head' to one on the embedding, .* Leave both out"),
    (lambda: combined(weights=[1.0]), ValueError, r"one finite weight for each adapter, .* and the weights \[1.0\]"),
    (lambda: combined(name="a.b"), ValueError, "a name that a module can have, got 'a.b'. .* Choose another name"),
    (lambda: combined(["other"], [1.0]), ValueError, "The model has no adapter 'other'. It has default, second"),
    (lambda: combined(name="second"), ValueError, "has an adapter 'second' already. Choose another name"),
    (lambda: combined(combination_type="linear"), ValueError, "'linear' combines A and B apart, .* Use 'cat'"),
    (
        lambda: combined(combination_type="dare_ties"),
        ValueError,
        "'dare_ties' combines A and B .* Use 'dare_ties_svd'",
    ),
    (lambda: combined(combination_type="mean"), ValueError, "`combination_type` must be one of .* got 'mean'"),
    (
        lambda: combined(combination_type="ties_svd"),
        ValueError,
        r"`density` must be in \(0, 1\] .* 'ties_svd', got None",
    ),
    (lambda: combined(majority_sign_method="all"), ValueError, "must be 'total' or 'frequency', got 'all'"),
    (lambda: combined(combination_type="svd", svd_rank=0), ValueError, "`svd_rank` must be a positive integer, got 0"),
    (lambda: combined(svd_clamp=2), ValueError, r"`svd_clamp` must be a quantile in \[0, 1\], got 2"),
    (lambda: combined(second={"masking": "merge"}), ValueError, 'the same `masking`, got "always" and "merge"'),
    (
        lambda: combined(second={"train_norms": True}),
        ValueError,
        "Adapter 'second' also trains whole parameters, by `modules_to_save`. Merge it",
    ),
    (
        lambda: combined(first={"save_mask": True}, edit=narrow),
        ValueError,
        "different masks in 'model.layers.0.mlp.up_proj', .* Combine adapters that were trained on the same zeros",
    ),
    (
        lambda: combined(edit=lambda layer: layer.A["second"].to("meta")),
        ValueError,
        "A and B are in the memory of this process. They are on the meta device, .* Load the adapters in one process",
    ),
    (
        lambda: swap(merged()),
        ValueError,
        "Adapter 'default' is merged into the base weights, .* Call `unmerge_adapter",
    ),
    (
        lambda: swap(adapted(), drop="layers.0.mlp.up_proj.mask_lora_B"),
        RuntimeError,
        r"does not fit 'model.layers.0.mlp.up_proj': A and B have the shapes .* and \(\(8, 16\), None\) arrived. Swap",
    ),
    (
        lambda: swap(adapted(), train_norms=True),
        RuntimeError,
        "The new MASK_LORA adapter brings other tensors, such as .*norm.weight'. Load it by `load_adapter`",
    ),
    (
        lambda: swap(
            experts(),
            get_peft_model(tiny("mixtral"), MaskLoRAConfig(target_modules=[], target_parameters=["down_proj"])),
        ),
        ValueError,
        "Hotswap needs adapters of the same `target_parameters`. Adapter 'default' has .*gate_up_proj'",
    ),
    (
        lambda: swap(adapted(train_norms=True)),
        ValueError,
        "Adapter 'default' also trains whole parameters, by `modules_to_save`, which would stay. Delete it",
    ),
    (
        merged_by_lora_first,
        ValueError,
        r"A Linear has merged its adapter into the same weight, and .* Call `unmerge_adapter\(\)` first",
    ),
    (lora_merged_beside, ValueError, "'mask' is active in .*q_proj' and would stay unmerged, .* Merge all active"),
    (
        transformers_hotswap,
        ValueError,
        "'default' is there already, and Transformers exchanges adapters in place for LoRA alone. Call `model.del",
    ),
    (
        lambda: get_peft_model(llama(), MaskLoRAConfig(target_modules=["q_proj"]), adapter_name="my.adapter"),
        ValueError,
        "a name that a module can have, got 'my.adapter'. .* Choose another name",
    ),
    (
        lambda: adapted().add_adapter("__base__", MaskLoRAConfig(target_modules=["q_proj"])),
        ValueError,
        "got '__base__'. .* which means no adapter, cannot be used",
    ),
    (
        lambda: get_peft_model(nn.Sequential(nn.LazyLinear(8)), MaskLoRAConfig(target_modules=["0"])),
        ValueError,
        "The weight of '0' has no shape and no values until the model has run. Run it",
    ),
    (lambda: prepared(target_rank=4), ValueError, "at least the rank of every adapter, got 4 for rank 8. Pass"),
    (lambda: prepared(check_compiled="no"), ValueError, "`check_compiled` must be 'error', 'warn' or .* got 'no'"),
    (prepared_late, ValueError, "compiled already. Call `prepare_model_for_compiled_hotswap` before"),
    (
        offloaded,
        ValueError,
        "adapted layer are on the meta device: accelerate has offloaded them, .* merge the adapters before offloading",
    ),
    (attached_after_offloading, ValueError, "are on the meta device, .* attach and load the adapter before that"),
    (
        with_masks_not_removed,
        ValueError,
        "layers.0.mlp.up_proj' is computed from other parameters, .* Call `torch.nn.utils.prune.remove",
    ),
    (lambda: MaskLoRAConfig(r=0), ValueError, "`r` must be a positive integer, got 0"),
    (lambda: MaskLoRAConfig(rank_pattern={"q": -1}), ValueError, r"`rank_pattern\['q'\]` must be a positive integer"),
    (
        lambda: MaskLoRAConfig(lora_alpha=None),
        ValueError,
        "`lora_alpha` must be a number, got None. Use `lora_alpha=r`",
    ),
    (lambda: MaskLoRAConfig(lora_dropout=1.0), ValueError, r"`lora_dropout` must be in \[0, 1\), got 1.0"),
    (lambda: MaskLoRAConfig(bias="some"), ValueError, "`bias` must be one of .* got 'some'"),
    (lambda: MaskLoRAConfig(on_mask_mismatch="no"), ValueError, "`on_mask_mismatch` must be one of"),
    (
        lambda: MaskLoRAConfig(target_modules="all-linear", layers_to_transform=[1]),
        ValueError,
        "`layers_to_transform` cannot be used when `target_modules` is a str. Got 'all-linear'. Pass a list",
    ),
    (
        lambda: get_peft_model(llama(), MaskLoRAConfig(target_modules=["embed_tokens"])),
        TypeError,
        "Target module Embedding.* is not supported. MaskLoraModel adapts",
    ),
    (
        lambda: MaskLoRAConfig(format_version=99),
        ValueError,
        "format version 99. The installed .* up to 2. Upgrade the pack",
    ),
    (lambda: MaskLoRAConfig(masking="later"), ValueError, "`masking` must be one of .* got 'later'"),
    (lambda: ScaledLoRAConfig(init_weights="pissa"), ValueError, "`init_weights` must be one of .* got 'pissa'"),
    (lambda: ScaledLoRAConfig(residual="yes"), ValueError, "`residual` must be one of .* got 'yes'"),
    (
        lambda: ScaledLoRAConfig(init_weights="paper", residual=True),
        ValueError,
        "needs `residual=False`, got `residual=True`. Leave `residual` out",
    ),
    (
        lambda: adapted(train_head="full", model=headless()),
        ValueError,
        "output head or a classifier, and none was found",
    ),
    (
        lambda: adapted(train_head="adapter", modules_to_save=["lm_head"]),
        ValueError,
        "'lm_head' is trained as a whole, because `modules_to_save` has 'lm_head'. .* Use `train_head=\"none\"`",
    ),
    (
        lambda: adapted(train_head="adapter", model=tiny("gpt2")),
        ValueError,
        "'lm_head' shares its weight with the emb",
    ),
    (lambda: adapted()(TOKENS, adapter_names=["default"]), ValueError, "Length of `adapter_names` .* got 1 and 4"),
    (
        lambda: merged().eval()(TOKENS, adapter_names=["default"] * 4),
        ValueError,
        "Cannot pass `adapter_names` when there are",
    ),
    (
        lambda: adapted().train()(TOKENS, adapter_names=["default"] * 4),
        ValueError,
        "when the model is in training mode. Call `model.eval",
    ),
    (
        lambda: adapted()(TOKENS, adapter_names=["other"] * 4),
        ValueError,
        "non-existing adapter.*: other. The model has default",
    ),
    (unreadable, TypeError, "The weights of stub layers cannot be read, .* saved with `save_mask=True`"),
    (
        other_proof,
        ValueError,
        r"trained on other zeros .* a weight of 24 x 16 has sparsity 0\.0.*, and in the",
    ),
    (other_masks, ValueError, "'first' and 'other' have different masks, so that .* Choose one of them by `set_adap"),
    (trained_base_of_zero3, ValueError, "that ZeRO-3 has split among processes is trained, .* Freeze the base weight"),
    (foreign_mask, ValueError, "adapter 'default'. The mask .* keeps 25.0% of the .* Load the"),
    (other_parameters, ValueError, "the same `target_parameters`. Adapter 'default' has .*gate_up_proj"),
    (mamba, ValueError, "'out_proj' of a mamba model cannot be adapted, because .* Leave out_proj"),
    (lambda: experts(lora_dropout=0.1), ValueError, "`lora_dropout` must be 0 for `target_parameters`, got 0.1"),
    (
        lambda: experts().eval()(TOKENS, adapter_names=["default"] * 4),
        ValueError,
        "are not supported with `target_parameters`. Choose one",
    ),
    (
        lambda: attention(cpu_offload),
        ValueError,
        "loads an offloaded weight when its layer is called, .* with the class of that module in `preload_module_clas",
    ),
    (
        lambda: attention(adapter_names=["default"] * 2),
        ValueError,
        "not supported for a layer whose weight another module reads, .* Choose one adapter",
    ),
    (computed_later, ValueError, r"q_proj' is computed from other parameters, so that .* Call `torch.nn.utils.param"),
    (quantised_later, ValueError, "was quantised after an adapter was attached .* Quantise the base model first, and"),
    (
        received_by_another_scaling,
        ValueError,
        "configuration: .* was 1.0,1,always, and here it is 8.0,1,.* by `hotswap_",
    ),
    (vector_parameter, ValueError, "needs parameters of 2 or 3 dimensions, got 'weight' of shape"),
    (
        pruned_beside,
        ValueError,
        "1 of 1 have fewer zeros in this base model, such as 'lm_head': sparsity 0.0.*, where it was 0.5.* Load the",
    ),
    (mismatch, ValueError, "trained on other zeros .* in 1 of 1 layers .*lm_head: adapter 0.5123, model 0.0000"),
    (lambda: nan_adapter().merge_adapter(safe_merge=True), ValueError, "NaNs detected in the merged weights"),
    (lambda: register("mask_lora", ForeignConfig, MaskLoraModel), RuntimeError, "'mask_lora' is registered already"),
    (
        lambda: merged_state_dict(adapted_by(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))),
        ValueError,
        r"q_proj' \(Linear\) would fill 128 zeros of its pruned weight. Save the adapter beside",
    ),
    (
        lambda: merged_state_dict(adapted_by(PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))),
        TypeError,
        "Adapter 'default' consists of trained prompts, which cannot be merged .* Save the adapter instead",
    ),
    (
        lambda: merged_state_dict(adapted_by(AdaptionPromptConfig(adapter_len=2, adapter_layers=1))),
        TypeError,
        "AdaptionPromptModel belongs to an adapter that cannot be taken out of the model",
    ),
    (unreadable_merge, TypeError, r"up_proj' cannot be dequantised \(stub\), so that no adapter can be merged"),
    (sharded_codes, TypeError, "up_proj' is quantised and sharded over processes, .* Save the adapter, load it"),
    (mixed_methods, TypeError, r"Several methods adapt the weight of .*q_proj', and one of \['.*'\] does not add"),
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_the_refusal_says_what_to_do(refused, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        refused()
