"""Every zero of the model is protected in training, whatever is pruned or adapted in this run."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_sparse import MaskLoRAConfig, PruningCallback, SparseTrainer, ZeroGuardCallback, prune, sparsity
from peft_sparse.training.protected import PROTECTED_SHARE, check_fingerprints, stored_matrices
from peft_sparse.training.zero_guard import note_pruning

from conftest import Samples, inputs_of, tiny
from trainers import arguments


ALL = r".*(proj|lm_head|embed_tokens)"


def every_zero(model):
    return {name: p.detach() == 0 for name, p in model.named_parameters() if p.dim() > 1 and "lora_" not in name}


def assert_no_zero_lost(model, zeros):
    for name, parameter in model.named_parameters():
        if name in zeros:
            assert (parameter[zeros[name]] == 0).all(), name


def half_zero(*parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter[torch.rand_like(parameter) < 0.5] = 0


def train(model, path, data=None, kind=SparseTrainer, callbacks=(), **options):
    args = arguments(path, **{"weight_decay": 0.1, "max_steps": 3, "logging_steps": 1} | options)
    trainer = kind(model, args, train_dataset=data or Samples(), callbacks=list(callbacks))
    trainer.train()
    return trainer


class Vandal(TrainerCallback):
    """Fills the zeros of one parameter in the middle of training."""

    def __init__(self, name):
        self.name = name

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.get_parameter(self.name).data.add_(1)


RUNS = {
    "pruned before, one layer pruned further": {"sparsity": 0.7, "target_modules": ["down_proj"]},
    "pruned before, a layer excluded": {"exclude_modules": ["q_proj"]},
    "pruned before, all defaults": {},
}


@pytest.mark.parametrize("run", RUNS)
def test_the_targets_of_a_run_do_not_say_what_is_protected(tmp_path, llama, run):
    prune(llama, 0.5, target_modules=r".*(proj|lm_head)")
    half_zero(llama.model.embed_tokens.weight)
    zeros = every_zero(llama)
    trainer = train(llama, tmp_path, **RUNS[run])
    assert_no_zero_lost(llama, zeros)
    options = RUNS[run]
    logged = [entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry]
    # The logged sparsity is that of the targets.
    targets = options.get("target_modules"), options.get("exclude_modules")
    assert set(logged) == {round(sparsity(llama, *targets), 6)}


def test_convolutions_embeddings_and_classifiers_are_protected(tmp_path):
    model = tiny("vit")
    embedding = model.get_input_embeddings().projection.weight
    half_zero(embedding, model.classifier.weight)
    prune(model, 0.5)
    zeros = every_zero(model)
    pixels = inputs_of("vit", 8)["pixel_values"]
    data = [{"pixel_values": image, "labels": torch.tensor(i % 2)} for i, image in enumerate(pixels)]
    before = embedding.detach().clone()
    train(model, tmp_path, data, remove_unused_columns=False)
    assert not torch.equal(embedding, before)
    assert_no_zero_lost(model, zeros)


@pytest.mark.parametrize("kind", [SparseTrainer, Trainer])
def test_inactive_copies_and_frozen_weights_are_protected_too(tmp_path, llama, kind):
    half_zero(llama.lm_head.weight)
    prune(llama, 0.5)
    config = MaskLoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(llama, config)
    model.add_adapter("other", copy.deepcopy(config))
    zeros = every_zero(model)
    assert sum("lm_head" in name for name in zeros) == 3
    callbacks = [ZeroGuardCallback()] if kind is Trainer else []
    options = {"kind": kind, "callbacks": callbacks}
    train(model, tmp_path, **options)
    assert_no_zero_lost(model, zeros)
    lost = "base_model.model.lm_head.modules_to_save.other.weight"
    options["callbacks"] = [*callbacks, Vandal(lost)]
    with pytest.raises(RuntimeError, match="The weight of 'lm_head.modules_to_save.other' lost zeros"):
        train(model, tmp_path, **options)


def test_a_new_classifier_of_zeros_learns_and_a_pruned_weight_of_zeros_does_not(tmp_path, caplog):
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config)
    silent = model.bert.encoder.layer[1].output.dense.weight
    with torch.no_grad():
        model.classifier.weight.zero_()
        silent.zero_()
    data = [{"input_ids": row, "labels": torch.tensor(i % 2)} for i, row in enumerate(Samples().tokens)]
    train(model, tmp_path, data)
    assert (model.classifier.weight != 0).all()
    assert not silent.any()
    assert (
        "1 trained weights consist of zeros, the first of which is 'bert.encoder.layer.1.output.dense'" in caplog.text
    )


def test_what_this_run_pruned_is_protected_however_little_it_is(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=48, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    trainer = train(model, tmp_path, sparsity=0.0015, save_strategy="steps", save_steps=3)
    assert sparsity(model) == trainer.pruning_report.sparsity > 0
    assert {entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry} == {
        round(sparsity(model), 6)
    }
    # A plain trainer that continues does not prune again, and knows the zeros from the checkpoint.
    callbacks = [PruningCallback(0.0015), ZeroGuardCallback()]
    args = arguments(tmp_path, TrainingArguments, max_steps=5, weight_decay=0.1)
    again = Trainer(transformers.LlamaForCausalLM(config), args, train_dataset=Samples(), callbacks=callbacks)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert sparsity(again.model) == sparsity(model)


def test_adapters_may_leave_zero_and_a_few_zeros_are_no_mask(tmp_path, llama):
    few, many = llama.model.layers[0].mlp.up_proj.weight, llama.lm_head.weight
    count = int(PROTECTED_SHARE * few.numel())
    with torch.no_grad():
        few.view(-1)[:count] = 0
        many.view(-1)[: int(PROTECTED_SHARE * many.numel()) + 1] = 0
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["up_proj", "lm_head"])
    model = get_peft_model(llama, config)
    guard = ZeroGuardCallback()
    trained = stored_matrices(model)
    assert not any("lora_" in name for name in trained)
    assert len(trained) == 1 + 3 * 7 + 1 + 3 + 1
    train(model, tmp_path, kind=Trainer, callbacks=[guard])
    assert list(guard.kept) == ["lm_head.original_module", "lm_head.modules_to_save.default"]
    B = model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
    assert B.any()


def test_adapters_on_a_frozen_base_cost_nothing_at_a_log(tmp_path, llama, monkeypatch):
    """What is not looked at costs nothing: a frozen weight that loses zeros is found before saving, not at a log."""
    prune(llama, 0.5)
    model = get_peft_model(llama, MaskLoRAConfig(r=2, target_modules="all-linear"))
    seen = []
    real = transformers.Trainer.log
    monkeypatch.setattr(transformers.Trainer, "log", lambda self, logs, *a: (seen.append(logs), real(self, logs, *a)))
    name = "base_model.model.model.layers.1.mlp.up_proj.base_layer.weight"
    with pytest.raises(RuntimeError, match=r"'model.layers.1.mlp.up_proj' lost zeros"):
        train(model, tmp_path, callbacks=[Vandal(name)], save_strategy="steps", save_steps=3)
    assert [logs["sparsity"] for logs in seen] == [0.5, 0.5, 0.5]
    assert not list(tmp_path.glob("checkpoint-3/adapter*"))


def test_what_prunes_in_training_may_fill_no_zero(tmp_path, llama):
    class Refills(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.lm_head.weight.add_(1)
            note_pruning(model)

    half_zero(llama.lm_head.weight)
    with pytest.raises(RuntimeError, match="'lm_head' lost zeros"):
        train(llama, tmp_path, callbacks=[Refills()])


def test_without_the_guard_nothing_is_kept_and_nothing_fails(tmp_path, llama):
    prune(llama, 0.5)
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    trainer = SparseTrainer(llama, args, train_dataset=Samples())
    trainer.remove_callback(ZeroGuardCallback)
    trainer.train()
    trainer.save_model()
    trainer.save_merged_model(str(tmp_path / "merged"))
    assert sparsity(llama) < 0.1
    assert not any("sparsity" in entry for entry in trainer.state.log_history)


def test_a_plain_trainer_gets_the_same_guard(tmp_path, llama):
    half_zero(llama.lm_head.weight)
    prune(llama, 0.5)
    zeros = every_zero(llama)
    args = arguments(tmp_path, TrainingArguments, weight_decay=0.1)
    Trainer(llama, args, train_dataset=Samples(), callbacks=[ZeroGuardCallback()]).train()
    assert_no_zero_lost(llama, zeros)


HALF, MORE, NONE = "2x2:2:a", "2x2:3:b", None
COMPARED = {
    "the same": (HALF, HALF, False, True),
    "others": (HALF, "2x2:2:c", False, False),
    "others, trained": (HALF, "2x2:2:c", True, False),
    "further zeros": (HALF, MORE, False, False),
    "further zeros, trained": (HALF, MORE, True, True),
    "unknown zeros": (NONE, HALF, False, False),
    "unknown zeros, trained": (NONE, HALF, True, True),
    "no zeros any more, trained": (HALF, NONE, True, False),
    "fewer than are protected": ("999x1:1:a", NONE, False, True),
}


@pytest.mark.parametrize("case", COMPARED)
def test_a_resumed_run_may_have_further_zeros_only_where_it_trains(case):
    saved, found, trained, accepted = COMPARED[case]
    both = [{} if proof is None else {"w": proof} for proof in (saved, found)]
    if accepted:
        check_fingerprints(*both, ["w"] if trained else [])
    else:
        with pytest.raises(ValueError, match="differ in 1 weights, .* 'w'"):
            check_fingerprints(*both, ["w"] if trained else [])


def test_a_resumed_run_refuses_zeros_that_its_checkpoint_does_not_know(tmp_path):
    def made():
        model = get_peft_model(tiny("llama"), MaskLoRAConfig(r=2, target_modules=["q_proj"]))
        return SparseTrainer(
            model, arguments(tmp_path, sparsity=0.5, save_strategy="steps", save_steps=3), train_dataset=Samples()
        )

    made().train()
    other = made()
    half_zero(other.model.base_model.model.lm_head.weight)
    with pytest.raises(ValueError, match="masks of the checkpoint and of the model differ in 1 weights, .* 'lm_head'"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_pruning_writes_its_zeros_into_every_copy_of_a_layer(llama):
    config = MaskLoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp", "lm_head"])
    model = get_peft_model(llama, config)
    model.add_adapter("other", copy.deepcopy(config))
    PruningCallback(0.5, target_modules=r".*(proj|lm_head)").prune(model, 0)
    masks = {}
    for name, parameter in model.named_parameters():
        if "modules_to_save." in name or "original_module" in name:
            masks.setdefault(
                name.replace("original_module", "modules_to_save.default").replace(".other.", ".default."), []
            ).append(parameter == 0)
    assert len(masks) == 3 * 3 + 1
    for found in masks.values():
        assert len(found) == 3
        assert found[0].float().mean() == pytest.approx(0.5, abs=0.01)
        assert all(torch.equal(mask, found[0]) for mask in found)
