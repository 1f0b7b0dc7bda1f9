import copy

import datasets
import pytest
import torch
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_sparse import MaskLoRAConfig, PruningCallback, SparseTrainer, ZeroGuardCallback, prune, sparsity
from peft_sparse.pruning.criteria import CRITERIA

from checks import assert_same_weights, assert_same_zeros, zeros_of
from conftest import Samples, tiny
from trainers import StopAt, arguments


def adapted(**kwargs):
    return adapt(tiny("llama"), **kwargs)


def adapt(model, **kwargs):
    return get_peft_model(model, MaskLoRAConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **kwargs))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_it_prunes_trains_and_logs_the_sparsity(tmp_path, criterion):
    model = adapted(train_norms=True)
    trainer = SparseTrainer(
        model,
        arguments(tmp_path, sparsity=0.5, criterion=criterion, calibration_samples=8, max_steps=30),
        train_dataset=Samples(),
    )
    result = trainer.train()
    assert sparsity(model) == 0.5
    assert trainer.pruning_report.criterion == criterion
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(entry["sparsity"] == 0.5 for entry in trainer.state.log_history)
    assert result.metrics["train_loss"] > 0


def test_it_trains_what_was_pruned_before(tmp_path):
    model = adapted()
    prune(model, "2:4")
    zeros = zeros_of(model)
    trainer = SparseTrainer(model, arguments(tmp_path), train_dataset=Samples())
    trainer.train()
    assert_same_zeros(model, zeros)
    assert trainer.pruning_report is None


@pytest.mark.parametrize("criterion", ["wanda", "ria", "sparsegpt", "gblm"])
def test_the_first_training_samples_are_measured(tmp_path, criterion):
    samples = Samples()
    model = adapted()
    args = arguments(tmp_path, sparsity=0.5, criterion=criterion, calibration_samples=5, max_steps=1)
    SparseTrainer(model, args, train_dataset=samples).train()
    expected = tiny("llama")
    prune(expected, 0.5, criterion=criterion, calibration=samples.tokens[:5])
    assert_same_zeros(model, zeros_of(expected))


class Streamed(torch.utils.data.IterableDataset):
    """A training set whose length nobody knows."""

    def __iter__(self):
        samples = Samples()
        return (samples[index] for index in range(len(samples)))


@pytest.mark.parametrize("kind", ["torch", "datasets"])
def test_the_first_samples_of_a_stream_are_measured(tmp_path, kind):
    samples, model = Samples(), adapted()
    dataset = Streamed() if kind == "torch" else datasets.IterableDataset.from_generator(lambda: iter(Streamed()))
    args = arguments(tmp_path, sparsity=0.5, criterion="wanda", calibration_samples=5, max_steps=1)
    SparseTrainer(model, args, train_dataset=dataset).train()
    expected = tiny("llama")
    prune(expected, 0.5, criterion="wanda", calibration=samples.tokens[:5])
    assert_same_zeros(model, zeros_of(expected))
    args = arguments(tmp_path, sparsity=0.5, criterion="wanda", calibration_samples=25, max_steps=1)
    with pytest.raises(ValueError, match="`calibration_samples=25`, but the training set has only 24 samples"):
        SparseTrainer(model, args, train_dataset=dataset)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("base", ["dense", "pruned"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, base, family):
    def adapted():
        return adapt(tiny(family), train_norms=True, bias="all")

    options = {"sparsity": 0.5, "criterion": "wanda", "calibration_samples": 4, "save_steps": 2}
    args = arguments(tmp_path / "whole", save_strategy="steps", **options)
    whole = SparseTrainer(adapted(), args, train_dataset=Samples())
    whole.train()

    args = arguments(tmp_path / "halves", save_strategy="steps", **options)
    SparseTrainer(adapted(), args, train_dataset=Samples(), callbacks=[StopAt(4)]).train()
    model = adapted()
    if base == "pruned":
        prune(model, 0.5, criterion="wanda", calibration=Samples().tokens[:4])
    resumed = SparseTrainer(model, args, train_dataset=Samples())
    resumed.train(resume_from_checkpoint=True)

    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert resumed.state.log_history[-2]["loss"] == whole.state.log_history[-2]["loss"]


def test_resuming_on_other_zeros_is_refused(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, sparsity=0.5)
    SparseTrainer(adapted(), args, train_dataset=Samples()).train()
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, sparsity=0.75, max_steps=8)
    with pytest.raises(ValueError, match="checkpoint was written with other zeros .* in 21 layers, first 'model"):
        SparseTrainer(adapted(), args, train_dataset=Samples()).train(resume_from_checkpoint=True)


def test_the_saved_model_is_the_trained_one(tmp_path):
    model = adapted(train_norms=True)
    trainer = SparseTrainer(model, arguments(tmp_path, sparsity=0.5), train_dataset=Samples())
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    base = tiny("llama")
    prune(base, 0.5)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    tokens = Samples().tokens
    torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits)


class Vandal(TrainerCallback):
    """Writes to a pruned weight, as an optimiser or a dense merge would."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.get_base_model().model.layers[1].mlp.down_proj.get_base_layer().weight.add_(1e-3)


@pytest.mark.parametrize(
    "options",
    [{"logging_steps": 1}, {"logging_steps": 100, "save_strategy": "steps", "save_steps": 1}, {"logging_steps": 100}],
    ids=["at a log", "at a save", "at the end"],
)
def test_a_lost_zero_is_never_silent(tmp_path, options):
    args = arguments(tmp_path, sparsity=0.5, **options)
    trainer = SparseTrainer(adapted(), args, train_dataset=Samples(), callbacks=[Vandal()])
    with pytest.raises(RuntimeError, match="'model.layers.1.mlp.down_proj' lost zeros .* Train with MaskLoRAConfig"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*/adapter_model.safetensors"))


def test_lora_on_pruned_weights_is_told_of(tmp_path, caplog):
    for config, told in ((LoraConfig, True), (HiraConfig, False), (MaskLoRAConfig, False)):
        model = tiny("llama")
        prune(model, 0.5, target_modules=["q_proj"])
        model = get_peft_model(model, config(r=2, target_modules=["q_proj", "v_proj"]))
        caplog.clear()
        SparseTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=Samples()).train()
        said = "LoRA trains 3 pruned weights (first 'model.layers.0.self_attn.q_proj'): their zeros are kept below it"
        assert (said in caplog.text) == told, config


def test_a_weight_becoming_zero_is_no_loss(tmp_path):
    class Zeroes(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.get_base_model().model.layers[1].mlp.down_proj.get_base_layer().weight[0] = 0

    args = arguments(tmp_path, sparsity=0.5)
    SparseTrainer(adapted(), args, train_dataset=Samples(), callbacks=[Zeroes()]).train()


def test_the_callback_serves_a_plain_trainer(tmp_path):
    model = adapted()
    args = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", use_cpu=True, dataloader_pin_memory=False, save_strategy="no"
    )
    callback = PruningCallback("2:4", criterion="wanda", calibration=Samples().tokens)
    Trainer(model, args, train_dataset=Samples(), callbacks=[callback, ZeroGuardCallback()]).train()
    assert sparsity(model) == callback.report.sparsity == 0.5


def by_model_init(path, made=adapted, callbacks=None, **options):
    models = []

    def model_init():
        torch.manual_seed(0)
        models.append(made())
        return models[-1]

    kind = SparseTrainer if callbacks is None else Trainer
    args = arguments(path, max_steps=3, **options)
    return kind(model_init=model_init, args=args, train_dataset=Samples(), callbacks=callbacks), models


def one_by_one():
    return ({"input_ids": row[None]} for row in Samples(4).tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.5, "criterion": "wanda", "calibration_samples": 4},
        {"sparsity": 0.5, "pruning_schedule": "cubic", "pruning_rounds": 2},
        {"callbacks": [PruningCallback(0.5), ZeroGuardCallback()]},
        {"callbacks": [PruningCallback(0.5, criterion="wanda", calibration=one_by_one())]},
    ],
    ids=["once", "cubic", "a plain trainer", "a generator"],
)
def test_each_model_that_model_init_makes_is_pruned(tmp_path, options):
    trainer, models = by_model_init(tmp_path, **options)
    for _ in range(2):
        trainer.train()
        assert trainer.model is models[-1]
        assert sparsity(models[-1]) == 0.5
    assert_same_zeros(models[-1], zeros_of(models[-2]))


def test_a_resumed_run_with_model_init_ends_as_an_uninterrupted_one(tmp_path):
    options = {"sparsity": 0.5, "save_strategy": "steps", "save_steps": 1}
    whole, _ = by_model_init(tmp_path / "whole", **options)
    whole.train()
    first, _ = by_model_init(tmp_path / "halves", **options)
    first.add_callback(StopAt(1))
    first.train()
    resumed, _ = by_model_init(tmp_path / "halves", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed.model.merge_and_unload(), whole.model.merge_and_unload())


def test_each_model_that_model_init_makes_is_reconstructed(tmp_path):
    options = {"sparsity": 0.5, "recovery": "reconstruct", "calibration_samples": 4}
    trainer, models = by_model_init(tmp_path, made=lambda: tiny("llama"), **options)
    for _ in range(2):
        trainer.train()
        assert sparsity(trainer.model) == 0.5
    assert_same_weights(models[-1], models[-2])
    assert trainer.model is models[-1]


def test_the_callback_takes_what_prune_takes_and_nothing_else():
    for unknown in ({"criteria": "wanda"}, {"pattern": 0.5}, {"model": None}):
        with pytest.raises(TypeError, match=next(iter(unknown))):
            PruningCallback(0.5, **unknown)
    model, expected = adapted(), tiny("llama")
    pattern = {"q_proj": 0.25, "mlp.up_proj": "2:4"}
    options = {"criterion": lambda weight, statistics: -weight, "exclude_modules": ["o_proj"]}
    callback = PruningCallback(pattern, **options)
    callback.prune(model, seed=0)
    prune(expected, pattern, **options)
    assert_same_zeros(model, zeros_of(expected))
    assert len(callback.report.weights) == 6


def test_experts_are_pruned_below_their_adapters_and_guarded(tmp_path):
    config = {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
    model = get_peft_model(tiny("mixtral"), MaskLoRAConfig(r=2, task_type="CAUSAL_LM", **config))
    args = arguments(tmp_path, sparsity=0.5, criterion="wanda", calibration_samples=24, max_steps=2)
    trainer = SparseTrainer(model, args, train_dataset=Samples())
    trainer.train()
    assert sparsity(model) == 0.5
    assert any("experts.down_proj.3" in weight.name for weight in trainer.pruning_report.weights)
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.experts.get_base_layer().down_proj[2].add_(1e-3)
    with pytest.raises(RuntimeError, match=r"experts.down_proj.2' lost zeros .* \(1 such weights\)"):
        trainer.save_model(str(tmp_path / "adapter"))


def test_the_callback_prunes_a_trained_adapters_base_as_it_would_a_fresh_ones():
    model, expected = adapted(train_norms=True, init_weights=False), tiny("llama")
    callback = PruningCallback(0.5, criterion="wanda", calibration=Samples().tokens)
    callback.prune(model, seed=0)
    prune(expected, 0.5, criterion="wanda", calibration=Samples().tokens)
    assert_same_zeros(model, zeros_of(expected))


def test_pruning_does_not_change_the_order_of_the_data(tmp_path):
    def losses(prune_first):
        model = adapted()
        if prune_first:
            torch.manual_seed(42)
            prune(model, 0.5, criterion="random")
        options = {} if prune_first else {"sparsity": 0.5, "criterion": "random"}
        trainer = SparseTrainer(copy.deepcopy(model), arguments(tmp_path, **options), train_dataset=Samples())
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(True) == losses(False)


def test_arguments_share_out_refine_and_update(tmp_path):
    model = adapted()
    args = arguments(
        tmp_path, sparsity=0.5, allocation="owl", refinement="swap", update_kept=True, calibration_samples=4
    )
    trainer = SparseTrainer(model, args, train_dataset=Samples())
    trainer.train()
    report = trainer.pruning_report
    assert (report.allocation, report.refinement, report.update) == ("owl", "swap", True)
    assert all(weight.error <= weight.error_selected for weight in report.weights)
    assert sparsity(model) == pytest.approx(0.5, abs=1e-3)
