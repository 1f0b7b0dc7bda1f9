import copy
import dataclasses
import importlib
import json
import logging
import pickle
import re
import subprocess
import sys

import pytest
import torch
from accelerate import disk_offload
from huggingface_hub import ModelCard
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, prune
from peft_sparse.tuners import MaskLoraLinear

from checks import assert_same_zeros, assert_zeros_kept, train_some, zeros_of
from conftest import tiny


def config(**kwargs):
    return MaskLoRAConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | kwargs
    )


@pytest.fixture
def pruned(model):
    prune(model, 0.5)
    return model


@pytest.fixture
def sparse_llama(llama):
    prune(llama, 0.5)
    return llama


def test_registration_makes_a_real_member():
    member = PeftType.MASK_LORA
    assert member is PeftType["MASK_LORA"] is PeftType("MASK_LORA") is pickle.loads(pickle.dumps(member))
    assert member in list(PeftType)
    assert (member.name, member.value, str(member)) == ("MASK_LORA", "MASK_LORA", "PeftType.MASK_LORA")
    assert json.dumps(member) == '"MASK_LORA"'


def test_importing_again_is_safe():
    import peft_sparse.tuners as tuners

    importlib.reload(tuners)
    assert list(PeftType).count("MASK_LORA") == 1
    assert type(PeftConfig.from_peft_type(peft_type="MASK_LORA")) is MaskLoRAConfig


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@DTYPES
@pytest.mark.parametrize("config", [MaskLoRAConfig, ScaledLoRAConfig])
def test_a_merged_model_computes_the_trained_function_bit_for_bit(config, dtype, tokens):
    llama = tiny("llama").to(dtype)
    prune(llama, 0.5)
    wrapped = get_peft_model(llama, config(r=4, target_modules="all-linear", init_weights=False))
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    trained = wrapped(tokens).logits
    assert torch.equal(wrapped.merge_and_unload()(tokens).logits, trained)


# docs/numbers/tuners.md tells these numbers.
@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float32, 2.6e-7), (torch.bfloat16, 4.5e-3), (torch.float16, 5.7e-4)]
)
def test_merging_rank_one_changes_outputs_by_rounding_alone(dtype, expected):
    model = torch.nn.Sequential(torch.nn.Linear(576, 576, bias=False)).to(dtype)
    prune(model, 0.5, target_modules=["0"])
    wrapped = get_peft_model(model, ScaledLoRAConfig(r=1, target_modules=["0"]))
    for factors in (wrapped.base_model.model[0].A, wrapped.base_model.model[0].B):
        weight = factors["default"].weight
        weight.data += 0.1 * torch.randn(weight.shape)
    x = torch.randn(512, 576).to(dtype)
    trained = wrapped(x)
    wrapped.merge_adapter()
    difference = (wrapped(x) - trained).double().norm() / trained.double().norm()
    assert difference.item() == pytest.approx(expected, rel=0.5)


def test_an_adapter_survives_saving_and_loading(pruned, tokens, tmp_path):
    pruned.save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(pruned, config(train_norms=True, bias="all", use_rslora=True))
    train_some(wrapped, tokens)
    trained, zeros = wrapped(tokens).logits, zeros_of(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert type(PeftConfig.from_pretrained(tmp_path / "adapter")) is MaskLoRAConfig
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(loaded(tokens).logits, trained)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(reloaded(tokens).logits, trained)
    assert_zeros_kept(reloaded, zeros)


def test_the_base_model_is_found_by_name(sparse_llama, tokens, tmp_path):
    sparse_llama.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    wrapped = get_peft_model(base, config(init_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded(tokens).logits, wrapped(tokens).logits)


FRESH_PROCESS = """
import json, sys
import peft, peft.helpers, peft.tuners.mixed, peft.utils.hotswap
from transformers import AutoModelForCausalLM

MISSING = object()

def contents():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "peft":
            for key, value in vars(module).items():
                found[f"{name}.{key}"] = copied(value)
                if isinstance(value, type) and value.__module__ == name:
                    found |= {f"{name}.{key}.{inner}": copied(part) for inner, part in vars(value).items()}
    return found

def copied(value):
    return type(value)(value) if type(value) in (dict, list, set) else value

def changed(old, new):
    same = old == new if type(new) in (dict, list, set) else old is new
    return not same and not isinstance(new, type(sys))

before = contents()
import peft_sparse
changes = sorted(
    name for name, value in contents().items() if "__" not in name and changed(before.get(name, MISSING), value)
)
base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base")
model = peft.PeftModel.from_pretrained(base, sys.argv[1] + "/adapter").merge_and_unload()
print(json.dumps({"changes": changes, "sparsity": peft_sparse.sparsity(model)}))
"""


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory):
    """What another process found: the changes of PEFT on import, and the sparsity of a merged model."""
    folder = tmp_path_factory.mktemp("fresh")
    llama = tiny("llama")
    prune(llama, 0.5)
    llama.save_pretrained(folder / "base")
    get_peft_model(llama, config(init_weights=False)).save_pretrained(folder / "adapter")
    run = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(folder)], capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_an_adapter_is_loaded_in_a_fresh_process(fresh_process):
    assert fresh_process["sparsity"] == pytest.approx(0.5)


# docs/details/tuners.md lists them for users, `lora_extras` with the reason for each.
ENUM = {f"PeftType.{name}" for name in ("MASK_LORA", "SCALED_LORA")}
ENUM |= {f"PeftType.{name}" for name in ("_member_names_", "_member_map_", "_value2member_map_")}
TABLES = {f"PEFT_TYPE_TO_{name}_MAPPING" for name in ("CONFIG", "TUNER", "MIXED_MODEL", "PREFIX")}
REPLACED = {
    "peft.peft_model.PeftModel.create_or_update_model_card",
    "peft.helpers.LoraLayer",
    "peft.tuners.mixed.COMPATIBLE_TUNER_TYPES",
    "peft.tuners.mixed.model.COMPATIBLE_TUNER_TYPES",
    "peft.tuners.mixed.model.Configs",
    "peft.tuners.mixed.model.Layers",
    "peft.tuners.mixed.model.MixedModel._create_and_replace",
    "peft.tuners.tuners_utils.BaseTuner.merge_adapter",
    "peft.tuners.lora.arrow.check_loaded_lora_compatibility_arrow",
    "peft.utils.hotswap.hotswap_adapter_from_state_dict",
    "peft.utils.hotswap.prepare_model_for_compiled_hotswap",
}
EXTENDED = {"peft.utils.hotswap.CONFIG_KEYS_TO_CHECK", "peft.tuners.mixed.model.PREFIXES"}


def test_importing_changes_these_names_of_peft_and_no_others(fresh_process):
    changes = {name for name in fresh_process["changes"] if name.rpartition(".")[2] not in TABLES}
    assert changes == REPLACED | EXTENDED | {f"peft.utils.peft_types.{name}" for name in ENUM}


@pytest.mark.parametrize("config", [MaskLoRAConfig, ScaledLoRAConfig])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:Model (has|with) `tie_word_embeddings=True`"
)
def test_an_adapter_on_the_head_is_saved_while_it_is_merged(config, tied, tokens, tmp_path):
    settings = copy.deepcopy(tiny("llama").config)
    settings.tie_word_embeddings = tied
    base = type(tiny("llama"))(settings).eval()
    model = copy.deepcopy(base)
    model = get_peft_model(model, config(target_modules=["q_proj", "lm_head"], init_weights=False)).eval()
    expected = model(tokens).logits
    model.merge_adapter()
    model.save_pretrained(tmp_path)  # PEFT saves the weight of an adapted head, too
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path)(tokens).logits, expected)


@pytest.mark.parametrize("config", [MaskLoRAConfig, ScaledLoRAConfig])
def test_an_adapter_that_is_offloaded_is_saved_whole(config, sparse_llama, tokens, tmp_path):
    dense, base = tiny("llama").eval(), copy.deepcopy(sparse_llama).eval()
    options = {"modules_to_save": ["lm_head"], "init_weights": False}
    model = get_peft_model(sparse_llama, config(target_modules="all-linear", **options)).eval()
    expected = model(tokens).logits
    disk_offload(model, tmp_path / "offloaded", execution_device="cpu")
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "saved")(tokens).logits, expected)
    with pytest.raises(ValueError, match="trained on other zeros than this base model has"):
        PeftModel.from_pretrained(dense, tmp_path / "saved")


@pytest.mark.parametrize("config", [MaskLoRAConfig, ScaledLoRAConfig])
@pytest.mark.filterwarnings("error:Found missing adapter keys")
def test_a_layer_that_is_held_twice_is_loaded_by_both_names(config, tmp_path):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(8, 8)
            self.again = torch.nn.ModuleList([self.first])

        def forward(self, x):
            return self.again[0](self.first(x).relu())

    base, x = Twice(), torch.randn(3, 8)
    prune_matrix(base.first.weight)
    model = get_peft_model(copy.deepcopy(base), config(target_modules=["first"], init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path)(x), model(x))


@pytest.mark.parametrize("config", [MaskLoRAConfig, ScaledLoRAConfig])
def test_the_docstring_of_a_configuration_tells_every_field(config):
    told = re.findall(r"^        (\w+): ", config.__doc__.split("Args:")[1].split("Raises:")[0], flags=re.MULTILINE)
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    assert told == [field.name for field in dataclasses.fields(config) if field.name not in inherited]


class Doubling(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("config", [MaskLoRAConfig, ScaledLoRAConfig])
@pytest.mark.parametrize("kind", ["subclass", "hook", "own forward"])
def test_whatever_a_base_layer_does_besides_its_product_is_done(config, kind):
    layer = (Doubling if kind == "subclass" else torch.nn.Linear)(8, 8)
    prune_matrix(layer.weight)
    if kind == "hook":
        layer.register_forward_hook(lambda module, args, output: 2 * output)
    if kind == "own forward":
        layer.forward = lambda x: 2 * torch.nn.Linear.forward(layer, x)
    model, x = torch.nn.Sequential(layer), torch.randn(3, 8)
    expected = model(x)
    wrapped = get_peft_model(model, config(r=2, target_modules=["0"]))
    torch.testing.assert_close(wrapped(x), expected)
    wrapped(x).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for name, p in wrapped.named_parameters() if "_lora_" in name)


class Tripling(torch.nn.Linear):
    def __call__(self, x):
        return 3 * super().__call__(x)


@pytest.mark.parametrize("config", [MaskLoRAConfig, ScaledLoRAConfig])
@pytest.mark.parametrize("kind", ["own call", "hook", "hook before", "own forward"])
def test_hooks_and_own_calls_of_a_base_layer_act_on_the_adapter_too(config, kind):
    layer, calls = (Tripling if kind == "own call" else torch.nn.Linear)(8, 8), []
    prune_matrix(layer.weight)
    if kind == "hook":
        layer.register_forward_hook(lambda module, args, output: calls.append(output) or output.relu())
    elif kind == "hook before":
        layer.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    elif kind == "own forward":
        layer.forward = lambda x: torch.nn.Linear.forward(layer, x).relu()
    model, x = (
        get_peft_model(torch.nn.Sequential(layer), config(r=2, target_modules=["0"], init_weights=False)),
        torch.randn(3, 8),
    )
    y = model(x)
    y.square().sum().backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if "_lora_" in name)
    # A hook may count or collect, so that it must not run again in backward.
    assert len(calls) == (kind == "hook")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), y.detach())
        torch.testing.assert_close(model.merge_and_unload()(x), y.detach())


def prune_matrix(weight):
    with torch.no_grad():
        weight[:, ::2] = 0


def test_a_dense_layer_gets_plain_lora(llama, tokens):
    other = copy.deepcopy(llama)
    ours = get_peft_model(llama, config(init_weights=False))
    theirs = get_peft_model(other, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    weights = get_peft_model_state_dict(ours)
    theirs.load_state_dict(
        {k.replace("mask_lora", "lora").replace(".weight", ".default.weight"): v for k, v in weights.items()},
        strict=False,
    )
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-5)


def test_ranks_and_scalings_follow_the_patterns(sparse_llama):
    wrapped = get_peft_model(
        sparse_llama, config(rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 32}, use_rslora=True)
    )
    attention = wrapped.base_model.model.model.layers[1].self_attn
    assert (attention.q_proj.r["default"], attention.q_proj.scaling["default"]) == (2, 8 / 2**0.5)
    assert (attention.k_proj.r["default"], attention.k_proj.scaling["default"]) == (4, 16.0)


def test_norms_are_trained_saved_and_merged(model, tokens):
    wrapped = get_peft_model(model, config(train_norms=True))
    norms = {name for name, p in wrapped.named_parameters() if p.requires_grad and "mask_lora_" not in name}
    expected = [name for name, p in tiny_norms(model)]
    assert len(norms) == len(expected)
    assert {name.rpartition(".modules_to_save")[0] for name in norms} == {
        f"base_model.model.{name.rpartition('.')[0]}" for name in expected
    }


def tiny_norms(model):
    fresh = AutoModelForCausalLM.from_config(model.config)
    return [(name, p) for name, p in fresh.named_parameters() if "norm" in name or "ln_" in name]


def test_the_fingerprints_speak_of_the_unmerged_weight(sparse_llama, tmp_path):
    wrapped = get_peft_model(sparse_llama, config(init_weights=False))
    wrapped.save_pretrained(tmp_path / "unmerged")
    wrapped.merge_adapter()
    wrapped.save_pretrained(tmp_path / "merged")
    proofs = [PeftConfig.from_pretrained(tmp_path / kind).mask_fingerprints for kind in ("unmerged", "merged")]
    assert proofs[0] == proofs[1]
    assert len(proofs[0]) == 21
    assert PeftConfig.from_pretrained(tmp_path / "merged").sparsity == pytest.approx(0.5)


def test_another_mask_is_noticed_or_accepted_as_asked(sparse_llama, tmp_path):
    get_peft_model(sparse_llama, config()).save_pretrained(tmp_path)
    dense = tiny("llama")
    with pytest.raises(ValueError, match="trained on other zeros .* 21 of 21 layers .* adapter 0.5000, model 0.0000"):
        PeftModel.from_pretrained(dense, tmp_path)
    assert not any(isinstance(module, MaskLoraLinear) for module in dense.modules())
    lenient = PeftConfig.from_pretrained(tmp_path)
    lenient.on_mask_mismatch = "warn"
    with pytest.warns(UserWarning, match="trained on other zeros"):
        PeftModel.from_pretrained(dense, tmp_path, config=lenient)
    lenient.on_mask_mismatch = "ignore"
    PeftModel.from_pretrained(tiny("llama"), tmp_path, config=lenient)


def test_a_model_keeps_working_after_a_deep_copy_and_a_pickle(sparse_llama, tokens):
    wrapped = get_peft_model(sparse_llama, config(init_weights=False))
    expected = wrapped(tokens).logits
    assert torch.equal(copy.deepcopy(wrapped)(tokens).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(wrapped))(tokens).logits, expected)


def test_gradient_checkpointing_changes_no_gradient(sparse_llama, tokens):
    wrapped = get_peft_model(sparse_llama, config(init_weights=False)).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            wrapped.enable_input_require_grads()
            wrapped.gradient_checkpointing_enable()
        wrapped.zero_grad()
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append([p.grad.clone() for p in wrapped.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_transformers_own_adapter_methods(sparse_llama, tokens, tmp_path):
    sparse_llama.add_adapter(config(init_weights=False), "one")
    expected = sparse_llama(tokens).logits
    sparse_llama.save_pretrained(tmp_path)
    fresh = tiny("llama")
    prune(fresh, 0.5)
    fresh.load_adapter(str(tmp_path), "one")
    torch.testing.assert_close(fresh(tokens).logits, expected)


def test_the_model_card_tells_a_stranger_how_to_load(sparse_llama, tmp_path):
    wrapped = get_peft_model(sparse_llama, config())
    wrapped.save_pretrained(tmp_path)
    wrapped.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.count("import peft_sparse") == 1
    assert "50.0% of the entries of the adapted weights are zero" in card.text
    assert {"peft_sparse", "sparse"} <= set(card.data.tags)
    assert card.data.library_name == "peft"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["requires"] == "peft_sparse"


def test_a_configuration_serves_another_model_after_saving(sparse_llama, tmp_path):
    shared = config()
    get_peft_model(sparse_llama, shared).save_pretrained(tmp_path)
    get_peft_model(tiny("llama"), shared)
    assert PeftConfig.from_pretrained(tmp_path).mask_fingerprints


def test_a_saved_mask_is_that_of_the_base_when_it_is_saved(llama, tokens, tmp_path):
    wrapped = get_peft_model(llama, config(save_mask=True, init_weights=False))
    prune(wrapped, 0.5)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, wrapped.eval()(tokens).logits)
    assert_same_zeros(loaded, zeros_of(wrapped))


def test_unpruned_targets_are_mentioned_once(llama, caplog):
    with caplog.at_level(logging.WARNING):
        get_peft_model(llama, config())
    assert [r.getMessage() for r in caplog.records] == [
        "21 of 21 adapted weights are not pruned (first 'model.layers.0.self_attn.q_proj'). MaskLoRA is plain LoRA "
        "there until they are pruned."
    ]


def test_a_rank_beyond_full_rank_is_mentioned_once(sparse_llama, caplog):
    with caplog.at_level(logging.WARNING):
        get_peft_model(sparse_llama, config(r=12))
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        "`r` exceeds the full rank of 6 adapted weights (first 'model.layers.0.self_attn.k_proj')"
    ]


def test_a_configuration_leaves_the_dicts_that_it_is_given_alone():
    ranks, alphas = {"q_proj": 2}, {"k_proj": 32.0}
    config = ScaledLoRAConfig(target_modules=["q_proj"], rank_pattern=ranks, alpha_pattern=alphas)
    assert (ranks, alphas) == ({"q_proj": 2}, {"k_proj": 32.0})
    assert config.alpha_pattern == {"q_proj": 2, "k_proj": 32.0}


def test_further_arguments_reach_the_base_layer_of_a_batch_with_several_adapters():
    class Base(torch.nn.Linear):
        def forward(self, x, shift=0.0):
            return super().forward(x) + shift

    model = get_peft_model(torch.nn.Sequential(Base(4, 4)), MaskLoRAConfig(target_modules=["0"]))
    layer, x = model.base_model.model[0], torch.randn(2, 4)
    assert torch.equal(layer(x, 1.0, adapter_names=["__base__"] * 2), layer.base_layer(x, 1.0))
