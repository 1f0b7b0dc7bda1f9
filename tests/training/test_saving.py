"""`save_merged_model` and `save_base_model`: complete plain models, whatever was attached and however."""

import copy
import importlib.util
import json
from unittest import mock

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, SparseTrainer, merged_state_dict, prune, sparsity
from peft_sparse.training.saving import save_plain_model
from peft_sparse.tuners.ties import settle_ties

from checks import assert_same_weights, assert_zeros_kept, zeros_of
from conftest import FAMILIES, VOCABULARY, Samples, inputs_of, tiny
from trainers import arguments


pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")


def pruned():
    model = tiny("llama")
    prune(model, 0.5)
    return model


def by_peft(model, config):
    return get_peft_model(model, config)


def by_mixed(model, config):
    return PeftMixedModel(model, config)


def by_transformers(model, config):
    model.add_adapter(config)
    return model


def by_injection(model, config):
    return inject_adapter_in_model(config, model)


def assert_complete(folder):
    files = {path.name for path in folder.iterdir()}
    assert files >= {"model.safetensors", "config.json", "generation_config.json", "README.md"}
    assert not any(name.startswith("adapter") for name in files)


@pytest.mark.parametrize("tuner", [MaskLoRAConfig, ScaledLoRAConfig])
@pytest.mark.parametrize("attach", [by_peft, by_mixed, by_transformers, by_injection])
def test_a_trained_model_is_saved_plain_however_its_adapter_was_attached(attach, tuner, tmp_path, tokens):
    model = pruned()
    base, zeros = copy.deepcopy(model), zeros_of(model)
    adapted = attach(model, tuner(r=4, target_modules="all-linear", init_weights=False))
    trainer = SparseTrainer(adapted, arguments(tmp_path), train_dataset=Samples())
    # A mixed model is not one that Transformers' Trainer trains.
    if attach is not by_mixed:
        trainer.train()
    expected = adapted.eval()(input_ids=tokens).logits
    trainer.save_merged_model(str(tmp_path / "merged"))
    trainer.save_base_model(str(tmp_path / "base"))
    for name in ("merged", "base"):
        assert_complete(tmp_path / name)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_zeros_kept(merged, zeros)
    torch.testing.assert_close(merged(tokens).logits, expected)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), base)
    assert torch.equal(adapted(input_ids=tokens).logits, expected)


def test_the_saved_base_and_the_saved_adapter_are_the_trained_model_also_after_a_merge(tmp_path, tokens):
    config = MaskLoRAConfig(r=4, target_modules="all-linear", init_weights=False, train_norms=True)
    adapted = get_peft_model(pruned(), config)
    trainer = SparseTrainer(adapted, arguments(tmp_path), train_dataset=Samples())
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    expected = adapted.eval()(tokens).logits
    adapted.merge_adapter()
    trainer.save_base_model(str(tmp_path / "base"))
    trainer.save_merged_model(str(tmp_path / "merged"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "adapter")(tokens).logits, expected)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits, expected)


def test_the_card_of_a_merged_model_tells_its_sparsity_and_no_package(tmp_path):
    trainer = SparseTrainer(by_transformers(pruned(), MaskLoRAConfig()), arguments(tmp_path), train_dataset=Samples())
    trainer.save_merged_model(str(tmp_path / "merged"))
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert "50.0% of the prunable weights" in card.text
    assert "import peft_sparse" not in card.text
    assert {"peft_sparse", "sparse", "pruned"} <= set(card.data.tags)


@pytest.mark.parametrize("where", ["processing_class", "data_collator"])
def test_tokeniser_and_generation_settings_are_saved_too(where, tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")), pad_token="?")
    model = pruned()
    model.generation_config = GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.5)
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    beside = {"processing_class": tokenizer} if where == "processing_class" else {"data_collator": collator}
    adapted = get_peft_model(model, MaskLoRAConfig())
    trainer = SparseTrainer(adapted, arguments(tmp_path), train_dataset=Samples(), **beside)
    trainer.save_merged_model(str(tmp_path / "merged"))
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    assert GenerationConfig.from_pretrained(tmp_path / "merged").max_new_tokens == 7


def test_a_model_is_as_it_was_when_saving_fails(tmp_path, tokens):
    adapted = by_transformers(pruned(), MaskLoRAConfig(target_modules="all-linear", init_weights=False))
    trainer = SparseTrainer(adapted, arguments(tmp_path), train_dataset=Samples())
    before, config = copy.deepcopy(adapted.state_dict()), copy.deepcopy(adapted.config.to_dict())
    full = mock.patch("transformers.modeling_utils.safe_save_file", side_effect=OSError("disk full"))
    with full, pytest.raises(OSError, match="disk full"):
        trainer.save_merged_model(str(tmp_path / "merged"))
    assert all(torch.equal(adapted.state_dict()[name], tensor) for name, tensor in before.items())
    assert adapted.config.to_dict() == config
    assert adapted.active_adapters() == ["default"]
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
@pytest.mark.parametrize("where", ["cpu", "disk", "both", "before"])
def test_a_model_that_accelerate_has_offloaded_is_saved_whole(where, tmp_path, tokens):
    model = pruned()
    config = MaskLoRAConfig(target_modules=["q_proj", "up_proj"], init_weights=False, modules_to_save=["norm"])
    if where == "before":
        places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "disk"}
        places |= {"model.layers.2": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "off", force_hooks=True)
        config = copy.deepcopy(config)
        config.target_modules = ["layers.2.self_attn.q_proj"]
    adapted = get_peft_model(model, config)
    expected = merged_state_dict(adapted) if where != "before" else None
    base = merged_state_dict(adapted, merge=False)
    if where == "cpu":
        cpu_offload(adapted, execution_device=torch.device("cpu"))
    elif where == "disk":
        disk_offload(adapted, tmp_path / "off", execution_device=torch.device("cpu"))
    elif where == "both":
        names = [f"layers.{index}" for index in range(3)] + ["norm", "rotary_emb", "embed_tokens"]
        places = {f"base_model.model.model.{name}": "cpu" for name in names} | {"base_model.model.lm_head": "cpu"}
        places["base_model.model.model.layers.1"] = "disk"
        dispatch_model(adapted, places, main_device="cpu", offload_dir=tmp_path / "off", force_hooks=True)
    offloaded = sum(parameter.is_meta for parameter in adapted.parameters())
    assert offloaded
    for merge, folder in ((True, "merged"), (False, "base")):
        save_plain_model(adapted, str(tmp_path / folder), merge=merge, write=True, sparsity=0.5)
        found, wanted = merged_state_dict(adapted, merge=merge), expected if merge else base
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict()
        assert saved.keys() == found.keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in found.items())
        assert wanted is None or all(torch.equal(saved[name], tensor) for name, tensor in wanted.items())
    assert sum(parameter.is_meta for parameter in adapted.parameters()) == offloaded


class Classifier(nn.Module):
    """A model that is none of Transformers'."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.also = self.head

    def forward(self, x):
        return self.also(self.inner(x))


def test_a_model_of_another_library_is_saved_as_a_state_dict(tmp_path):
    model, x = Classifier(), torch.randn(3, 8)
    prune(model, 0.5, target_modules=["inner"])
    adapted = inject_adapter_in_model(MaskLoRAConfig(target_modules=["inner"], init_weights=False), model)
    save_plain_model(adapted, str(tmp_path / "merged"), merge=True, write=True, sparsity=0.5)
    fresh = Classifier()
    fresh.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    torch.testing.assert_close(fresh(x), adapted(x))
    assert (fresh.inner.weight == 0).float().mean() == 0.5


class Saving(Classifier):
    def save_pretrained(self, folder):
        torch.save(self.state_dict(), folder)


def test_a_model_with_a_way_of_saving_of_its_own_is_saved_by_it(tmp_path):
    adapted = inject_adapter_in_model(MaskLoRAConfig(target_modules=["inner"], init_weights=False), Saving())
    with mock.patch("peft_sparse.training.saving.complete_card"):
        save_plain_model(adapted, str(tmp_path / "file"), merge=True, write=True, sparsity=0.5)
    fresh, x = Classifier(), torch.randn(3, 8)
    fresh.load_state_dict(torch.load(tmp_path / "file"))
    torch.testing.assert_close(fresh(x), adapted(x))


def llama_64():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **sizes)
    ).eval()


def bitsandbytes(**options):
    return transformers.BitsAndBytesConfig(**options)


def torchao(**options):
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


SCHEMES = {
    "nf4": ("bitsandbytes", lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "int8": ("bitsandbytes", lambda: bitsandbytes(load_in_8bit=True)),
    "torchao": ("torchao", torchao),
}


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantised_model_is_saved_quantised(scheme, tmp_path, tokens):
    package, quantization = SCHEMES[scheme]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    model = llama_64()
    prune(model, 0.5)
    model.save_pretrained(tmp_path / "dense")

    def load(folder, **options):
        return AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32, **options).eval()

    adapted = get_peft_model(
        load("dense", quantization_config=quantization()),
        MaskLoRAConfig(target_modules=["q_proj", "up_proj"], init_weights=False, modules_to_save=["norm"]),
    ).eval()
    base = load("dense", quantization_config=quantization())(tokens).logits
    expected = adapted(tokens).logits
    for merge, folder in ((True, "merged"), (False, "base")):
        save_plain_model(adapted, str(tmp_path / folder), merge=merge, write=True, sparsity=0.5)
    assert torch.equal(adapted(tokens).logits, expected)
    torch.testing.assert_close(load("base")(tokens).logits, base)
    torch.testing.assert_close(load("merged")(tokens).logits, adapted.merge_and_unload()(tokens).logits)


# -- heads that are tied to the embedding ----------------------------------------------------------------------------

VLM = transformers.Gemma3Config(
    text_config=copy.deepcopy(FAMILIES["gemma3"]).to_dict() | {"tie_word_embeddings": True},
    vision_config={
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 8,
        "patch_size": 4,
    },
    mm_tokens_per_image=4,
)
ATTENTION = {"gpt2": "c_attn", "t5": "q", "umt5": "q"}
EMBEDDING = {"gpt2": "wte", "t5": "shared", "bart": "shared"}
UMT5 = transformers.UMT5Config(
    vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
)


def tied(family):
    torch.manual_seed(0)
    config = copy.deepcopy({"vlm": VLM, "umt5": UMT5}.get(family) or FAMILIES[family])
    config.tie_word_embeddings = True
    if family == "vlm":
        model = transformers.Gemma3ForConditionalGeneration(config)
    elif family in ("t5", "bart", "umt5"):
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    return model.eval()


def stirred(model, **targets):
    adapted = get_peft_model(model, MaskLoRAConfig(r=4, init_weights=False, **targets)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return adapted


def assert_loads_right(adapted, folder, inputs):
    """What a reader ties by the saved configuration is one weight in the file, and all others are in the file."""
    model = adapted.get_base_model()
    expected, config = adapted(**inputs).logits, copy.deepcopy(model.config.to_dict())
    save_plain_model(adapted, str(folder), merge=True, write=True, sparsity=0.5)
    assert model.config.to_dict() == config
    assert torch.equal(adapted(**inputs).logits, expected)
    loaded, told = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    torch.testing.assert_close(loaded.eval()(**inputs).logits, expected)
    # A reader that ties by the configuration alone, whatever the file holds.
    loaded.tie_weights()
    torch.testing.assert_close(loaded(**inputs).logits, expected)
    return loaded


@pytest.mark.parametrize("how", ["adapter", "module", "embedding", "none"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3", "bart", "vlm"])
def test_a_tied_head_that_was_changed_is_saved_untied(family, how, tmp_path):
    attention = ATTENTION.get(family, "q_proj")
    targets = {
        "adapter": {"target_modules": [attention, "lm_head"]},
        "module": {"target_modules": [attention], "modules_to_save": ["lm_head"]},
        "embedding": {"target_modules": [attention], "modules_to_save": [EMBEDDING.get(family, "embed_tokens")]},
        "none": {"target_modules": [attention]},
    }
    adapted = stirred(tied(family), **targets[how])
    inputs = inputs_of("llama" if family == "vlm" else family)
    loaded = assert_loads_right(adapted, tmp_path / "merged", inputs)
    config = loaded.config
    for part in (config, config.get_text_config()):
        assert part.tie_word_embeddings == (how == "none")


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`", "ignore:Input and output embeddings are")
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3", "bart", "vlm"])
def test_a_tied_head_that_is_merged_in_memory_is_saved_untied(family, tmp_path):
    adapted = stirred(tied(family), target_modules=[ATTENTION.get(family, "q_proj"), "lm_head"])
    inputs = inputs_of("llama" if family == "vlm" else family)
    embedding = adapted.get_input_embeddings().weight
    expected, before = adapted(**inputs).logits, embedding.detach().clone()
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected)
    assert torch.equal(embedding, before)
    merged.save_pretrained(tmp_path)
    loaded, told = type(merged).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    loaded.tie_weights()
    torch.testing.assert_close(loaded.eval()(**inputs).logits, expected)


@pytest.mark.parametrize("family", ["t5", "umt5"])
def test_a_merge_that_could_not_be_saved_is_refused_and_changes_nothing(family):
    adapted, inputs = stirred(tied(family), target_modules=["q", "lm_head"]), inputs_of("t5")
    expected = adapted(**inputs).logits
    with pytest.raises(ValueError, match="are one tied weight, .* A saved model cannot hold them apart"):
        adapted.merge_and_unload()
    assert torch.equal(adapted(**inputs).logits, expected)


@pytest.mark.parametrize("family", ["t5", "umt5"])
def test_a_family_that_ties_whatever_its_configuration_says_is_saved_where_the_tie_holds(family, tmp_path):
    adapted = stirred(tied(family), target_modules=["q"])
    assert_loads_right(adapted, tmp_path / "merged", inputs_of("t5"))


def test_a_head_that_was_untied_by_its_file_is_saved_as_it_was(tmp_path):
    model = tied("t5")
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").eval()
    assert model.lm_head.weight is not model.shared.weight
    adapted = stirred(model, target_modules=["q", "lm_head"])
    expected = adapted(**(inputs := inputs_of("t5"))).logits
    save_plain_model(adapted, str(tmp_path / "merged"), merge=True, write=True, sparsity=0.5)
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=1e-4)


def test_a_head_and_an_embedding_that_are_both_trained_are_saved_apart(tmp_path):
    adapted = stirred(tied("llama"), target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    assert_loads_right(adapted, tmp_path / "merged", inputs_of("llama"))


def test_a_head_with_trained_tokens_stays_tied(tmp_path):
    adapted = get_peft_model(tied("llama"), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(1)
    loaded = assert_loads_right(adapted.eval(), tmp_path / "merged", inputs_of("llama"))
    assert loaded.config.tie_word_embeddings
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")


def test_a_trainer_saves_a_trained_tied_head(tmp_path, tokens):
    model = tied("llama")
    prune(model, 0.5)
    adapted = get_peft_model(model, MaskLoRAConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    trainer = SparseTrainer(adapted, arguments(tmp_path), train_dataset=Samples())
    trainer.train()
    expected = adapted.eval()(tokens).logits
    trainer.save_merged_model(str(tmp_path / "merged"))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(tokens).logits, expected)
    assert sparsity(loaded) == sparsity(model)


def test_a_tie_is_seen_where_no_process_holds_the_weights():
    model = tied("llama").to("meta")
    model.tie_weights()
    config = model.config
    assert settle_ties(model, model) == []
    assert model.config.tie_word_embeddings
    assert model.config is not config


def test_a_process_that_does_not_write_refuses_what_the_others_refuse(tmp_path):
    adapted = stirred(tied("t5"), target_modules=["lm_head"])
    with pytest.raises(ValueError, match="are one tied weight"):
        save_plain_model(adapted, str(tmp_path / "merged"), merge=True, write=False, sparsity=0.5)
    save_plain_model(adapted, str(tmp_path / "base"), merge=False, write=False, sparsity=0.5)
    assert not (tmp_path / "base").exists()


def test_an_adapter_inside_a_model_is_merged_too(tmp_path):
    model = tied("vlm")
    inputs = inputs_of("llama")
    model.model.language_model.add_adapter(MaskLoRAConfig(target_modules=["q_proj"], init_weights=False))
    expected = model.eval()(**inputs).logits
    save_plain_model(model, str(tmp_path / "merged"), merge=True, write=True, sparsity=0.0)
    loaded, told = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(told.values())
    torch.testing.assert_close(loaded.eval()(**inputs).logits, expected)
