"""Checkpoints as people have them: layouts that are converted, several stacks, classes to be found, other files."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_sparse import prune, prune_checkpoint, reconstruct, reconstruct_checkpoint
from peft_sparse.model.blocks import find_blocks
from peft_sparse.pruning.checks import pruning_task
from peft_sparse.pruning.streamed_model import StreamedModel
from peft_sparse.reconstruction import Fit

from conftest import ENCODER_DECODERS, GATED, SHORT, inputs_of, tiny


VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
MARIAN = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
OTHERS = {
    "granitemoe": lambda: transformers.GraniteMoeForCausalLM(
        transformers.GraniteMoeConfig(**SHORT, **GATED, num_local_experts=4, num_experts_per_tok=2)
    ),
    "llava": lambda: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION, image_size=8, patch_size=4),
            text_config=LlamaConfig(**SHORT, **GATED),
        )
    ),
    # Its positions are sinusoids that no checkpoint holds.
    "marian": lambda: transformers.MarianMTModel(
        transformers.MarianConfig(
            **MARIAN,
            vocab_size=32,
            d_model=16,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=16,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    ),
    # All layers are one.
    "albert": lambda: transformers.AlbertForMaskedLM(
        transformers.AlbertConfig(**SHORT, embedding_size=8, intermediate_size=24)
    ),
}


def made(family):
    torch.manual_seed(0)
    return (OTHERS[family]() if family in OTHERS else tiny(family)).eval()


def tensors_in(folder):
    return {name: tensor for path in Path(folder).glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_files(folder, other):
    found, expected = tensors_in(folder), tensors_in(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_pruned_as_in_memory(folder, cls, **options):
    """Prune the checkpoint in `folder` on disk and in memory, and compare all tensors of the two files."""
    report = prune_checkpoint(folder / "dense", folder / "sparse", 0.5, **options)
    loaded = cls.from_pretrained(folder / "dense")
    expected = prune(loaded, 0.5, **options)
    loaded.save_pretrained(folder / "expected")
    assert report.weights == expected.weights
    assert_same_files(folder / "sparse", folder / "expected")
    _, info = cls.from_pretrained(folder / "sparse", output_loading_info=True)
    assert not any(info.values())


# -- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "t5", "bart", "llama", "vit", *OTHERS])
def test_what_is_written_is_what_save_pretrained_writes_of_the_pruned_model(family, original, tmp_path):
    made(family).save_pretrained(tmp_path / "dense", save_original_format=original, max_shard_size="20KB")
    assert_pruned_as_in_memory(tmp_path, type(made(family)))


@pytest.mark.parametrize("options", [{}, {"allocation": "owl"}, {"refinement": "swap", "update": True}])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "granitemoe"])
def test_experts_in_the_layout_of_the_hub_are_measured_as_if_the_model_were_loaded(family, options, tmp_path):
    made(family).save_pretrained(tmp_path / "dense")
    assert any(".experts.3." in name or "input_linear" in name for name in tensors_in(tmp_path / "dense"))
    calibration = [inputs_of("llama", 24)]
    assert_pruned_as_in_memory(tmp_path, type(made(family)), criterion="wanda", calibration=calibration, **options)


def test_experts_in_the_layout_of_the_hub_are_reconstructed_as_if_the_model_were_loaded(tmp_path):
    made("mixtral").save_pretrained(tmp_path / "dense")
    calibration, fit = [inputs_of("llama", 24)] * 2, Fit(max_steps=2, holdout=0)
    reconstruct_checkpoint(tmp_path / "dense", tmp_path / "sparse", 0.5, calibration, fit=fit)
    loaded = type(made("mixtral")).from_pretrained(tmp_path / "dense")
    reconstruct(loaded, 0.5, calibration, fit=fit)
    loaded.save_pretrained(tmp_path / "expected")
    assert_same_files(tmp_path / "sparse", tmp_path / "expected")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("saved", "named"), [("LlamaModel", "LlamaForCausalLM"), ("LlamaForCausalLM", "LlamaModel")])
def test_a_model_with_a_head_and_one_without_read_each_others_checkpoints(saved, named, tied, tmp_path):
    config = LlamaConfig(**SHORT, **GATED, tie_word_embeddings=tied)
    getattr(transformers, saved)(config).save_pretrained(tmp_path / "dense")
    rename(tmp_path / "dense", [named])
    if named == "LlamaForCausalLM" and not tied:
        with pytest.raises(ValueError, match=r"no tensor for 'lm_head.weight' \(1 such .* of LlamaForCausalLM\)"):
            prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", 0.5)
        assert not (tmp_path / "sparse").exists()
    elif not tied:
        with pytest.warns(UserWarning, match="Not copied: tensors that LlamaModel does not have: lm_head"):
            assert_pruned_as_in_memory(tmp_path, getattr(transformers, named))
    else:
        assert_pruned_as_in_memory(tmp_path, getattr(transformers, named))


def test_a_head_that_differs_from_the_embedding_it_should_be_tied_to_is_kept(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHORT, **GATED)).save_pretrained(tmp_path / "dense")
    edit(tmp_path / "dense", tie_word_embeddings=True)
    assert_pruned_as_in_memory(tmp_path, LlamaForCausalLM)
    assert "lm_head.weight" in tensors_in(tmp_path / "sparse")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_loaded_in_the_dtype_that_from_pretrained_takes(dtype, tmp_path):
    model = made("t5").to(dtype)
    model.save_pretrained(tmp_path / "dense")
    for said in ("float16", None):
        edit(tmp_path / "dense", dtype=said)
        (tmp_path / str(said)).mkdir()
        (tmp_path / str(said) / "dense").symlink_to(tmp_path / "dense")
        assert_pruned_as_in_memory(tmp_path / str(said), type(model))


# -- several stacks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_a_block_of_any_stack_is_in_memory_when_it_is_asked_for_and_as_it_was_written(family, tmp_path):
    dense = made(family)
    dense.save_pretrained(tmp_path / "dense")
    streamed = StreamedModel(tmp_path / "dense", tmp_path / "sparse", "cpu")
    streamed.start(pruning_task(streamed.model, 0.5, loaded=False))
    blocks, expected = streamed.blocks, find_blocks(dense)
    first, last = list(blocks)[0], list(blocks)[-1]

    def assert_holds(name, factor):
        for key, parameter in blocks[name].named_parameters():
            assert torch.equal(parameter, factor * expected[name].get_parameter(key)), (name, key)

    with streamed.resident(first, blocks[first]):
        with torch.no_grad():
            for parameter in blocks[first].parameters():
                parameter.mul_(2)
        streamed.save(first)
    for _ in range(2):
        with streamed.resident(last, blocks[last]), streamed.resident(first, blocks[first]):
            with streamed.resident(last, blocks[last]):
                assert_holds(last, 1)
            assert_holds(last, 1)
            assert_holds(first, 2)
        assert all(parameter.is_meta for block in blocks.values() for parameter in block.parameters())
    streamed.finish()
    found = find_blocks(type(dense).from_pretrained(tmp_path / "sparse"))
    for name, block in found.items():
        for key, parameter in block.named_parameters():
            assert torch.equal(parameter, (2 if name == first else 1) * expected[name].get_parameter(key)), (name, key)


def test_stacks_that_are_not_pruned_are_written_as_they_were(tmp_path):
    made("llava").save_pretrained(tmp_path / "dense")
    assert_pruned_as_in_memory(tmp_path, type(made("llava")), target_modules=r".*language_model.*mlp.*")


# -- the class of the model -------------------------------------------------------------------------------------------


def edit(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rename(folder, architectures):
    edit(folder, architectures=architectures)


@pytest.mark.parametrize("architectures", [None, [], ["LlamaForSequenceClassification", "LlamaForCausalLM"]])
@pytest.mark.parametrize("tied", [True, False])
def test_of_several_classes_the_one_is_taken_that_the_tensors_fit(architectures, tied, tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHORT, **GATED, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "dense")
    rename(tmp_path / "dense", architectures)
    assert_pruned_as_in_memory(tmp_path, LlamaForCausalLM)


class OwnConfig(LlamaConfig):
    model_type = "peft_sparse_own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


@pytest.fixture
def registered():
    AutoConfig.register(OwnConfig.model_type, OwnConfig)
    AutoModelForCausalLM.register(OwnConfig, OwnModel)
    yield
    transformers.CONFIG_MAPPING._extra_content.pop(OwnConfig.model_type)
    transformers.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(OwnConfig)


def test_a_class_that_was_registered_is_found(registered, tmp_path):
    torch.manual_seed(0)
    OwnModel(OwnConfig(**SHORT, **GATED)).save_pretrained(tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["architectures"] == ["OwnModel"]
    assert_pruned_as_in_memory(tmp_path, OwnModel)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class RemoteConfig(LlamaConfig):
    model_type = "peft_sparse_remote"

class RemoteModel(LlamaForCausalLM):
    config_class = RemoteConfig
"""


def test_code_beside_the_weights_runs_if_it_is_trusted_and_goes_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    source = tmp_path / "dense"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHORT, **GATED)).save_pretrained(source)
    (source / "remote.py").write_text(CODE)
    auto_map = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteModel"}
    edit(source, model_type="peft_sparse_remote", auto_map=auto_map, architectures=["RemoteModel"])
    with pytest.raises(ValueError, match="trust_remote_code"):
        prune_checkpoint(source, tmp_path / "sparse", 0.5)
    prune_checkpoint(source, tmp_path / "sparse", 0.5, trust_remote_code=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", trust_remote_code=True)
    expected = LlamaForCausalLM.from_pretrained(source, config=LlamaConfig(**SHORT, **GATED))
    prune(expected, 0.5)
    assert type(loaded).__name__ == "RemoteModel"
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))


# -- other files ------------------------------------------------------------------------------------------------------

BELONGS = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "qwen.tiktoken",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
    "README.md",
    "LICENSE",
    "NOTICE.txt",
]
DENSE = [
    "model.gguf",
    "tf_model.h5",
    "flax_model.msgpack",
    "consolidated.00.pth",
    "model.onnx",
    "onnx/model.onnx",
    "pytorch_model.pt",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "model.fp16.safetensors",
    "original/consolidated.safetensors",
    "readme.bin",
    "modeling_own.py",
]


def test_only_files_that_are_known_to_belong_to_the_model_are_copied_and_the_others_are_named_once(llama, tmp_path):
    source = tmp_path / "source"
    llama.save_pretrained(source, max_shard_size="20KB")
    for name in (*BELONGS, *DENSE, ".cache/huggingface/lock", ".gitattributes"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")
    with pytest.warns(UserWarning, match="files that may hold dense weights or belong to no model: ") as told:
        prune_checkpoint(source, tmp_path / "pruned", 0.5)
    (warning,) = [str(each.message) for each in told]
    assert warning.split("no model: ")[1] == ", ".join(sorted(DENSE)) + ". Copy what the pruned model needs."
    pruned = tmp_path / "pruned"
    found = {path.relative_to(pruned).as_posix() for path in pruned.rglob("*") if path.is_file()}
    shards = {f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)}
    assert found == shards | {"config.json", "generation_config.json", "model.safetensors.index.json", *BELONGS}


def test_tensors_that_the_model_does_not_have_are_named(llama, tmp_path):
    source = tmp_path / "source"
    llama.save_pretrained(source)
    extra = {f"model.layers.3.mtp.{index}.weight": torch.ones(3, 3) for index in range(7)}
    save_file(load_file(source / "model.safetensors") | extra, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="LlamaForCausalLM does not have: model.layers.3.mtp.0.weight, .* and 2 more"):
        prune_checkpoint(source, tmp_path / "pruned", 0.5)
    assert not extra.keys() & tensors_in(tmp_path / "pruned").keys()
