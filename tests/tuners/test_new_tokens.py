"""Tokens and tied modules that are trained beside the adapters: `trainable_token_indices`, `ensure_weight_tying`."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, SparseTrainer, prune, trainable_shares

from checks import assert_same_zeros, train_some, zeros_of
from conftest import Samples, tiny
from trainers import arguments


TUNERS = [MaskLoRAConfig, ScaledLoRAConfig]
TOKENS = [3, 7]


@pytest.fixture(params=TUNERS, ids=["MaskLoRA", "ScaledLoRA"])
def tuner(request):
    return request.param


def base(tied):
    model = tiny("llama")
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    prune(model, 0.5)
    return model


def config_of(tuner, **options):
    return tuner(**{"r": 2, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"} | options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("indices", [TOKENS, {"embed_tokens": TOKENS}])
def test_new_tokens_are_trained_saved_and_merged(tied, indices, tuner, tokens, tmp_path):
    model = base(tied)
    before, zeros = copy.deepcopy(model), zeros_of(model)
    wrapped = get_peft_model(model, config_of(tuner, trainable_token_indices=indices))
    train_some(wrapped, tokens)
    trained = wrapped(tokens).logits
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(before), tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, trained)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, trained, rtol=1e-4, atol=1e-5)
    assert_same_zeros(merged, zeros)
    changed = (merged.get_input_embeddings().weight != before.get_input_embeddings().weight).any(1).nonzero()
    assert changed.flatten().tolist() == TOKENS
    same = torch.equal(merged.lm_head.weight, merged.get_input_embeddings().weight)
    assert same == tied
    assert (
        trainable_shares(wrapped)["adapters"] > trainable_shares(get_peft_model(before, config_of(tuner)))["adapters"]
    )


def test_a_tied_module_is_trained_once(tuner, tokens, tmp_path):
    model = base(tied=True)
    before = copy.deepcopy(model)
    wrapped = get_peft_model(model, config_of(tuner, modules_to_save=["embed_tokens"], ensure_weight_tying=True))
    train_some(wrapped, tokens)
    trained = wrapped(tokens).logits
    embedding, head = wrapped.get_input_embeddings().weight, wrapped.get_output_embeddings().weight
    assert torch.equal(embedding, head)
    assert not torch.equal(embedding, before.get_input_embeddings().weight)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(before, tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, trained)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, trained, rtol=1e-4, atol=1e-5)


def test_untied_weights_are_mentioned(tuner):
    with pytest.warns(UserWarning, match="requested `ensure_weight_tying`, but no tied modules"):
        get_peft_model(base(tied=False), config_of(tuner, modules_to_save=["embed_tokens"], ensure_weight_tying=True))


def test_new_tokens_are_trained_by_the_trainer(tuner, tmp_path):
    wrapped = get_peft_model(base(tied=False), config_of(tuner, trainable_token_indices=TOKENS))
    delta = wrapped.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    before, zeros = delta.detach().clone(), zeros_of(wrapped)
    trainer = SparseTrainer(wrapped, arguments(tmp_path), train_dataset=Samples())
    trainer.train()
    assert not torch.equal(delta, before)
    assert_same_zeros(wrapped, zeros)


def word_tokenizer():
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


# TRL's own default.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_trl_adds_the_tokens_of_a_chat_template(tuner, tmp_path):
    import trl

    source = word_tokenizer()
    source.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    source.chat_template = "{% for m in messages %}<|turn|> {{ m['content'] }} {% endfor %}"
    source.save_pretrained(tmp_path / "source")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b a b"}]
    trainer = trl.SFTTrainer(
        base(tied=False),
        arguments(tmp_path, trl.SFTConfig, max_steps=2, bf16=False, chat_template_path=str(tmp_path / "source")),
        train_dataset=Dataset.from_list([{"messages": messages}] * 4),
        processing_class=word_tokenizer(),
        peft_config=config_of(tuner),
    )
    deltas = trainer.model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    before, zeros = deltas.detach().clone(), zeros_of(trainer.model)
    trainer.train()
    assert not torch.equal(deltas, before)
    assert_same_zeros(trainer.model, zeros)


@pytest.mark.parametrize("options", [{"trainable_token_indices": TOKENS}, {"train_head": "full"}])
def test_adapters_with_and_without_new_parameters_stand_side_by_side(options, tuner, tokens):
    model = base(tied=False)
    wrapped = get_peft_model(model, config_of(tuner, init_weights=False)).eval()
    alone = {"default": wrapped(tokens).logits}
    with wrapped.disable_adapter():
        alone["__base__"] = wrapped(tokens).logits
    wrapped.add_adapter("more", config_of(tuner, **options))
    wrapped.set_adapter("more")
    train_some(wrapped, tokens)
    alone["more"] = wrapped(tokens).logits
    names = (["default", "more", "__base__"] * len(tokens))[: len(tokens)]
    for active in ("default", "more"):
        wrapped.set_adapter(active)
        torch.testing.assert_close(wrapped(tokens).logits, alone[active])
        mixed = wrapped(tokens, adapter_names=names).logits
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], alone[name][row])


def test_the_fields_are_those_of_lora(tuner):
    ours, theirs = config_of(tuner), LoraConfig()
    for field in ("trainable_token_indices", "ensure_weight_tying"):
        assert getattr(ours, field) == getattr(theirs, field)
