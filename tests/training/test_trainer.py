import copy
import inspect

import datasets
import pytest
import torch
from peft import HiraConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from peft_sparse import MaskLoRAConfig, PruningCallback, SparseTrainer, ZeroGuardCallback, prune, sparsity

from checks import assert_same_weights, assert_same_zeros, zeros_of
from conftest import Samples, tiny
from trainers import arguments


def adapted(**kwargs):
    return adapt(tiny("llama"), **kwargs)


def adapt(model, **kwargs):
    return get_peft_model(model, MaskLoRAConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **kwargs))


def test_it_prunes_trains_and_logs_the_sparsity(tmp_path):
    model = adapted(train_norms=True)
    args = arguments(tmp_path, sparsity=0.5, criterion="wanda", calibration_samples=8, max_steps=30)
    trainer = SparseTrainer(model, args, train_dataset=Samples())
    result = trainer.train()
    assert sparsity(model) == 0.5
    assert trainer.pruning_report.criterion == "wanda"
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(entry["sparsity"] == 0.5 for entry in trainer.state.log_history if "pruning" not in entry)
    assert result.metrics["train_loss"] > 0


def test_it_trains_what_was_pruned_before(tmp_path):
    model = adapted()
    prune(model, "2:4")
    zeros = zeros_of(model)
    trainer = SparseTrainer(model, arguments(tmp_path), train_dataset=Samples())
    trainer.train()
    assert_same_zeros(model, zeros)
    assert trainer.pruning_report is None


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "gblm"])
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
    with pytest.raises(ValueError, match="`calibration_samples=25` needs as many training samples, .* has only 24"):
        SparseTrainer(model, args, train_dataset=dataset)


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


def test_adapters_whose_merge_fills_zeros_are_told_of(tmp_path, caplog):
    for config, told in ((LoraConfig, True), (LoHaConfig, True), (HiraConfig, False), (MaskLoRAConfig, False)):
        model = tiny("llama")
        prune(model, 0.5, target_modules=["q_proj"])
        model = get_peft_model(model, config(r=2, target_modules=["q_proj", "v_proj"]))
        caplog.clear()
        SparseTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=Samples()).train()
        said = (
            f"({config.__name__}) is attached to 3 pruned weights, the first of which is 'model.layers.0.self_attn.q"
        )
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


def by_model_init(path, made=adapted, callbacks=None, peft_config=None, **options):
    models = []

    def model_init():
        torch.manual_seed(0)
        models.append(made())
        return models[-1]

    args = arguments(path, max_steps=3, **options)
    given = {"model_init": model_init, "args": args, "train_dataset": Samples()}
    if callbacks is not None:
        return Trainer(**given, callbacks=callbacks), models
    return SparseTrainer(**given, peft_config=peft_config), models


def one_by_one():
    return ({"input_ids": row[None]} for row in Samples(4).tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.5, "criterion": "wanda", "calibration_samples": 4},
        {"sparsity": 0.5, "pruning_schedule": "cubic", "pruning_rounds": 2},
        {"callbacks": [PruningCallback(0.5, one_by_one(), criterion="wanda"), ZeroGuardCallback()]},
    ],
    ids=["once", "cubic", "a plain trainer and a generator"],
)
def test_each_model_that_model_init_makes_is_pruned(tmp_path, options):
    trainer, models = by_model_init(tmp_path, **options)
    for _ in range(2):
        trainer.train()
        assert trainer.model is models[-1]
        assert sparsity(models[-1]) == 0.5
    assert_same_zeros(models[-1], zeros_of(models[-2]))


def test_each_model_that_model_init_makes_is_reconstructed(tmp_path):
    options = {"sparsity": 0.5, "recovery": "reconstruct", "calibration_samples": 4}
    trainer, models = by_model_init(tmp_path, made=lambda: tiny("llama"), **options)
    for _ in range(2):
        trainer.train()
        assert sparsity(trainer.model) == 0.5
    assert_same_weights(models[-1], models[-2])
    assert trainer.model is models[-1]


def test_the_callback_takes_what_prune_takes_and_a_schedule():
    """Names, order and defaults, so that a call of one is a call of the other."""
    ours, theirs = (list(inspect.signature(function).parameters.values()) for function in (PruningCallback, prune))
    assert [(p.name, p.kind, p.default) for p in ours[:-1]] == [(p.name, p.kind, p.default) for p in theirs[1:]]
    assert ours[-1].name == "schedule"


def test_the_callback_prunes_as_prune_does():
    model, expected = adapted(), tiny("llama")
    pattern = {"q_proj": 0.25, "mlp.up_proj": "2:4"}
    options = {"criterion": lambda weight, statistics: -weight, "exclude_modules": ["o_proj"]}
    callback = PruningCallback(pattern, **options)
    callback.prune(model, seed=0)
    prune(expected, pattern, **options)
    assert_same_zeros(model, zeros_of(expected))
    assert len(callback.report.weights) == 6


def test_the_signature_is_that_of_trainer_and_our_three():
    ours, theirs = (list(inspect.signature(kind.__init__).parameters.values()) for kind in (SparseTrainer, Trainer))
    assert [(p.name, p.kind, p.default) for p in ours[:-3]] == [(p.name, p.kind, p.default) for p in theirs]
    assert [(p.name, p.kind) for p in ours[-3:]] == [
        ("peft_config", inspect.Parameter.KEYWORD_ONLY),
        ("teacher", inspect.Parameter.KEYWORD_ONLY),
        ("calibration_dataset", inspect.Parameter.KEYWORD_ONLY),
    ]


class Noting(TrainerCallback):
    pass


def test_positional_arguments_are_those_of_trainer(tmp_path):
    model, train, evaluation = tiny("llama"), Samples(), Samples(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")))
    called = {"loss": 0, "logits": 0}

    def loss_of(outputs, labels, num_items_in_batch=None):
        called["loss"] += 1
        return outputs.loss if "loss" in outputs else outputs.logits.mean()

    def metrics_of(prediction):
        return {"told": 1.0}

    def first_of(logits, labels):
        called["logits"] += 1
        return logits[..., 0]

    args = arguments(tmp_path, max_steps=1)
    trainer = SparseTrainer(
        model, args, default_data_collator, train, evaluation, tokenizer, None, loss_of, metrics_of, [Noting()],
        (optimizer, schedule), None, first_of,
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_told"] == 1.0
    assert (trainer.model, trainer.args, trainer.data_collator) == (model, args, default_data_collator)
    assert (trainer.train_dataset, trainer.eval_dataset, trainer.processing_class) == (train, evaluation, tokenizer)
    assert any(isinstance(callback, Noting) for callback in trainer.callback_handler.callbacks)
    assert min(called.values()) >= 1
    trainer = SparseTrainer(
        None, args, None, train, None, None, lambda: tiny("llama"), None, None, None, (None, None),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5}),
    )  # fmt: skip
    trainer.train()
    assert trainer.optimizer.param_groups[0]["momentum"] == 0.5


def test_peft_config_attaches_the_adapter(tmp_path):
    config = MaskLoRAConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    args = arguments(tmp_path, sparsity=0.5)
    trainer = SparseTrainer(tiny("llama"), args, train_dataset=Samples(), peft_config=config)
    assert config.target_modules == "all-linear", "the caller's configuration was changed"
    trainer.train()
    model = tiny("llama")
    torch.manual_seed(args.seed)
    expected = SparseTrainer(get_peft_model(model, config), args, train_dataset=Samples())
    expected.train()
    assert_same_weights(trainer.model, expected.model)
    assert trainer.model.get_nb_trainable_parameters()[0] < 0.3 * tiny("llama").num_parameters()
    assert sparsity(trainer.model.merge_and_unload()) == 0.5


def test_peft_config_attaches_an_adapter_to_each_model_of_model_init(tmp_path):
    config = MaskLoRAConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer, models = by_model_init(tmp_path, made=lambda: tiny("llama"), sparsity=0.5, peft_config=config)
    for _ in range(2):
        trainer.train()
        assert isinstance(trainer.model, PeftModel)
        assert sparsity(trainer.model) == 0.5
    assert len({id(model) for model in models}) == 3


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
    with pytest.raises(RuntimeError, match=r"experts.down_proj.2' lost zeros .* number of such weights is 1\."):
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
    args = arguments(tmp_path, sparsity=0.5, allocation="owl", refinement="swap", update=True, calibration_samples=4)
    trainer = SparseTrainer(model, args, train_dataset=Samples())
    trainer.train()
    report = trainer.pruning_report
    assert (report.allocation, report.refinement, report.update) == ("owl", "swap", True)
    assert all(weight.error <= weight.error_selected for weight in report.weights)
    assert sparsity(model) == pytest.approx(0.5, abs=1e-3)
