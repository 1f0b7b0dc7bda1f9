"""SparseTrainer(recovery="reconstruct"): what TrainingArguments say is what reconstruction does."""

import copy
import functools
import json
import math
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from peft_sparse import (
    LeastSquares,
    MaskLoRAConfig,
    SparseTrainer,
    SparseTrainingArguments,
    Swap,
    prune,
    reconstruct,
    sparsity,
)

from checks import assert_same_weights, assert_same_zeros, named, zeros_of
from rebuilding import assert_close_weights, lively, split
from trainers import StopAt


class Samples(torch.utils.data.Dataset):
    """Sequences of two lengths, the shorter ones padded."""

    def __init__(self, count=10):
        self.tokens = torch.randint(0, 61, (count, 10), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        mask = torch.ones(10, dtype=torch.long)
        mask[7 if index % 3 == 0 else 10 :] = 0
        return {"input_ids": self.tokens[index], "attention_mask": mask, "labels": self.tokens[index]}


def batches(size=2, count=8):
    samples = [Samples()[index] for index in range(count)]
    return [
        {
            name: torch.stack([sample[name] for sample in samples[i : i + size]])
            for name in ("input_ids", "attention_mask")
        }
        for i in range(0, count, size)
    ]


def arguments(path, **kwargs):
    defaults = {
        "sparsity": 0.5,
        "recovery": "reconstruct",
        "calibration_samples": 8,
        "reconstruction_holdout": 0,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 5e-3,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
    }
    return SparseTrainingArguments(str(path), use_cpu=True, dataloader_pin_memory=False, **(defaults | kwargs))


def trainer_of(path, model=None, callbacks=None, peft_config=None, **kwargs):
    return SparseTrainer(
        model or lively("llama"),
        arguments(path, **kwargs),
        train_dataset=Samples(),
        callbacks=callbacks,
        peft_config=peft_config,
    )


def by_function(model=None, **options):
    """The same run by the plain function, as `Trainer` would choose optimiser and schedule."""
    model = model or lively("llama")
    defaults = {
        "pattern": 0.5,
        "learning_rate": 5e-3,
        "holdout": 0,
        "seed": 42,
        "max_grad_norm": 1.0,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, 5e-3, weight_decay=0.0, fused=True),
        "scheduler": lambda optimizer, steps: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1 - step / steps
        ),
    }
    return model, reconstruct(model, calibration=batches(), **split(defaults | options))


@functools.cache
def plain_run():
    return by_function()[0]


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# -- it is reconstruct -----------------------------------------------------------------------------------------------


def test_training_is_reconstruction_by_the_arguments(tmp_path):
    trainer = trainer_of(tmp_path)
    result = trainer.train()
    model, report = by_function()
    assert_close_weights(trainer.model, model)
    assert [r.name for r in trainer.reconstruction_report.regions] == [r.name for r in report.regions]
    assert [r.error for r in trainer.reconstruction_report.regions] == pytest.approx([r.error for r in report.regions])
    assert all(region.error < region.error_pruned for region in trainer.reconstruction_report.regions)
    assert sparsity(trainer.model) == 0.5
    assert trainer.pruning_report is trainer.reconstruction_report.pruning
    assert trainer.pruning_report.sparsity == 0.5
    assert result.global_step == 6 * 4


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"num_train_epochs": 2, "gradient_accumulation_steps": 3}, {"epochs": 2, "gradient_accumulation_steps": 3}),
        ({"max_steps": 3}, {"max_steps": 3}),
        ({"seed": 7}, {"seed": 7}),
        ({"max_grad_norm": 1e-3}, {"max_grad_norm": 1e-3}),
        ({"bf16": True}, {"autocast": torch.bfloat16}),
        ({"reconstruction_holdout": 0.25}, {"holdout": 0.25}),
        ({"reconstruction_region": "block"}, {"region": "block"}),
        ({"reconstruction_region": "2"}, {"region": 2}),
        ({"reconstruction_region": "matrix"}, {"region": "matrix"}),
        ({"reconstruction_mode": "SD"}, {"mode": "SD"}),
        ({"reconstruction_mode": "DD"}, {"mode": "DD"}),
        ({"reconstruction_loss": "cosine"}, {"loss": "cosine"}),
        ({"criterion": "wanda"}, {"criterion": "wanda"}),
        ({"sparsity": None, "pattern": "2:4"}, {"pattern": "2:4"}),
        ({"allocation": "erk"}, {"allocation": "erk"}),
        (
            {"criterion": "wanda", "refinement": "swap", "refinement_options": {"max_swaps": 2}},
            {"criterion": "wanda", "refinement": Swap(max_swaps=2)},
        ),
        (
            {"update": True, "update_options": '{"damping": 0.1}'},
            {"update": LeastSquares(damping=0.1)},
        ),
        ({"group": "row"}, {"group": "row"}),
        ({"exclude_modules": ["q_proj"]}, {"exclude_modules": ["q_proj"]}),
        ({"target_modules": ["q_proj", "up_proj"]}, {"target_modules": ["q_proj", "up_proj"]}),
        ({"activations": "disk"}, {}),
        ({"optim": "sgd", "learning_rate": 0.1}, {"optimizer": lambda p: torch.optim.SGD(p, 0.1)}),
        (
            {"weight_decay": 2.0},
            {"optimizer": lambda parameters: torch.optim.AdamW(parameters, 5e-3, weight_decay=2.0, fused=True)},
        ),
        (
            {"lr_scheduler_type": "constant"},
            {"scheduler": lambda optimizer, steps: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)},
        ),
        (
            {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3},
            {
                "scheduler": lambda optimizer, steps: torch.optim.lr_scheduler.LambdaLR(
                    optimizer, lambda step: min(1, step / 3)
                )
            },
        ),
        (
            {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.6},
            {
                "scheduler": lambda optimizer, steps: torch.optim.lr_scheduler.LambdaLR(
                    optimizer, lambda step: min(1, step / math.ceil(0.6 * steps))
                )
            },
        ),
    ],
    ids=named,
)
def test_every_argument_is_heeded(tmp_path, given, meant):
    trainer = trainer_of(tmp_path, **given)
    result = trainer.train()
    model, report = by_function(**meant)
    assert_close_weights(trainer.model, model)
    assert result.global_step == sum(region.steps for region in report.regions)
    plain = plain_run()
    if given != {"activations": "disk"}:
        assert any(not torch.allclose(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_tuner_is_merged(tmp_path):
    config = MaskLoRAConfig(r=2, train_norms=True)
    trainer = trainer_of(tmp_path, peft_config=config)
    structure = str(trainer.model)
    trainer.train()
    model, _ = by_function(tuner=config)
    assert_close_weights(trainer.model, model)
    assert str(trainer.model) == structure
    assert trainer.reconstruction_report.tuner == "MASK_LORA"


def test_the_first_samples_are_used_and_no_others(tmp_path):
    seen = set()

    class Spied(Samples):
        def __getitem__(self, index):
            seen.add(index)
            return super().__getitem__(index)

    SparseTrainer(lively("llama"), arguments(tmp_path, calibration_samples=5), train_dataset=Spied()).train()
    assert seen == set(range(5))


def test_the_model_is_left_as_training_left_it(tmp_path):
    trainer = trainer_of(tmp_path, lively("opt").train())
    trainer.train()
    assert all(module.training for module in trainer.model.modules())
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert not any("forward" in module.__dict__ for module in trainer.model.modules())


@pytest.mark.parametrize("asked", [{"sparsity": None}, {}, {"sparsity": None, "pattern": "2:4"}], ids=named)
def test_a_teacher_gives_the_targets_of_a_model_that_was_pruned_before(tmp_path, asked):
    pattern = asked.get("pattern") or 0.5
    model, expected, dense = lively("llama"), lively("llama"), lively("llama")
    for pruned in (model, expected):
        prune(pruned, pattern)
    trainer = SparseTrainer(model, arguments(tmp_path, **asked), train_dataset=Samples(), teacher=dense)
    trainer.train()
    _, report = by_function(pattern=None, model=expected, dense=lively("llama"))
    assert_close_weights(trainer.model, expected)
    assert_same_weights(dense, lively("llama"))
    assert all(region.error < region.error_pruned for region in trainer.reconstruction_report.regions)
    assert [region.error for region in report.regions] == pytest.approx(logged(trainer, "error"))
    assert sparsity(trainer.model) == 0.5
    assert trainer.pruning_report is None


def test_a_model_that_is_pruned_already_gives_no_targets(tmp_path):
    model = lively("llama")
    prune(model, 0.5)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"50.0% of them are zero already, where 0.5 is asked: .* `SparseTrainer\("):
        trainer_of(tmp_path, model).train()
    assert_same_weights(model, before)
    # Nor does the model that a first run has pruned, whose regions are kept.
    trainer = trainer_of(tmp_path, save_strategy="steps")
    trainer.train()
    kept = sorted(path.name for path in (tmp_path / "reconstruction").iterdir())
    with pytest.raises(ValueError, match="50.0% of them are zero already"):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "reconstruction").iterdir()) == kept


# -- logs and callbacks ----------------------------------------------------------------------------------------------


def test_losses_errors_and_sparsity_are_logged(tmp_path):
    trainer = trainer_of(tmp_path)
    result = trainer.train()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(2, 25, 2))
    assert [entry["region"] for entry in history if "loss" in entry] == [n for n in range(6) for _ in range(2)]
    regions = trainer.reconstruction_report.regions
    assert logged(trainer, "error") == [region.error for region in regions]
    assert logged(trainer, "error_pruned") == [region.error_pruned for region in regions]
    assert logged(trainer, "reverted") == [0.0] * 6
    assert [(entry["region"], entry["step"]) for entry in history if "error" in entry] == [
        (number, 4 * number + 4) for number in range(6)
    ]
    shares = logged(trainer, "sparsity")
    assert len(shares) == len(history)
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] == 0.5
    assert result.training_loss == pytest.approx(sum(logged(trainer, "loss")) / 12)
    assert result.metrics["train_loss"] == logged(trainer, "train_loss")[0] == result.training_loss
    assert logged(trainer, "train_runtime")[0] > 0
    rates = logged(trainer, "learning_rate")
    assert rates == pytest.approx([2.5e-3, 0.0] * 6)


def test_the_loss_of_a_run_does_not_depend_on_how_often_it_is_logged(tmp_path):
    every, never = trainer_of(tmp_path, logging_steps=1), trainer_of(tmp_path, logging_strategy="no")
    first, second = every.train(), never.train()
    assert not logged(never, "loss")
    assert first.training_loss == pytest.approx(second.training_loss)
    assert first.training_loss == pytest.approx(sum(logged(every, "loss")) / 24)
    assert second.training_loss > 0


@pytest.mark.parametrize(
    ("family", "region", "regions"),
    [("llama", "submodule", 6), ("llama", "2", 2), ("llama", "matrix", 0), ("t5", "submodule", 4), ("t5", "3", 2)],
)
def test_as_many_steps_are_taken_as_the_progress_bar_was_promised(tmp_path, family, region, regions):
    promised = []

    class Spy(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            promised.append(state.max_steps)

    trainer = SparseTrainer(
        lively(family),
        arguments(tmp_path, reconstruction_region=region),
        train_dataset=OneSided(family),
        callbacks=[Spy()],
    )
    assert promised == []
    assert trainer.train().global_step == promised[0] == regions * 4


class OneSided(Samples):
    """What each family takes."""

    def __init__(self, family):
        super().__init__()
        self.family = family

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample if self.family == "t5" else {name: sample[name] for name in ("input_ids", "attention_mask")}


def test_callbacks_are_told_of_the_run(tmp_path):
    events = []

    class Spy(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            events.append(("begin", state.global_step, sparsity(model)))

        def on_step_end(self, args, state, control, model=None, **kwargs):
            events.append(("step", state.global_step, None))

        def on_log(self, args, state, control, logs=None, **kwargs):
            events.append(("log", state.global_step, set(logs)))

        def on_train_end(self, args, state, control, model=None, **kwargs):
            events.append(("end", state.global_step, sparsity(model)))

    trainer = trainer_of(tmp_path, callbacks=[Spy()], reconstruction_region="block", logging_steps=4)
    trainer.train()
    assert events[0] == ("begin", 0, 0.0)
    assert [step for kind, step, _ in events if kind == "step"] == list(range(1, 13))
    assert ("end", 12, 0.5) in events
    logs = [found for kind, _, found in events if kind == "log"]
    assert logs[:2] == [
        {"loss", "learning_rate", "region", "sparsity", "epoch"},
        {"region", "error_pruned", "error", "reverted", "sparsity", "epoch"},
    ]


def test_steps_can_be_logged_by_share(tmp_path):
    trainer = trainer_of(tmp_path, logging_steps=0.5)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [12, 24]


def test_what_got_worse_is_logged_as_reverted(tmp_path):
    trainer, pruned = trainer_of(tmp_path, learning_rate=30.0), lively("llama")
    trainer.train()
    prune(pruned, 0.5)
    assert logged(trainer, "reverted") == [1.0] * 6
    assert_same_weights(trainer.model, pruned)


# -- saving and resuming ---------------------------------------------------------------------------------------------


def test_what_is_saved_loads_with_the_same_zeros(tmp_path):
    trainer = trainer_of(tmp_path, peft_config=MaskLoRAConfig(r=2))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same_weights(loaded, trainer.model)
    assert_same_zeros(loaded, zeros_of(trainer.model))
    assert sparsity(loaded) == 0.5


class Interrupted(Exception):
    pass


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Interrupted


@pytest.mark.parametrize("by_path", [False, True])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, by_path):
    options = {
        "save_strategy": "steps",
        "peft_config": MaskLoRAConfig(r=2, target_modules=["q_proj", "o_proj", "up_proj"]),
    }
    whole = trainer_of(tmp_path / "whole", **options)
    expected = whole.train()
    with pytest.raises(Interrupted):
        trainer_of(tmp_path / "halves", callbacks=[Interrupt(14)], **options).train()
    folder = tmp_path / "halves" / "reconstruction"
    assert len(list(folder.glob("*.safetensors"))) == 3
    resumed = trainer_of(tmp_path / "halves", **options)
    found = resumed.train(resume_from_checkpoint=str(folder) if by_path else True)
    assert_same_weights(resumed.model, whole.model)
    assert found.global_step == expected.global_step == 24
    # Finished regions appear in the log, and are not trained again.
    assert logged(resumed, "error") == logged(whole, "error")
    losses = [(entry["step"], entry["loss"]) for entry in whole.state.log_history if "loss" in entry]
    assert [(entry["step"], entry["loss"]) for entry in resumed.state.log_history if "loss" in entry] == losses[6:]
    assert [replace(region, seconds=0) for region in resumed.reconstruction_report.regions] == [
        replace(region, seconds=0) for region in whole.reconstruction_report.regions
    ]


def test_a_callback_that_stops_leaves_a_run_to_be_resumed_and_no_model(tmp_path):
    whole = trainer_of(tmp_path / "whole", save_strategy="steps")
    whole.train()
    stopped = trainer_of(tmp_path / "halves", save_strategy="steps", callbacks=[StopAt(14)])
    said = r"stopped reconstruction in 'model.layers.1 \(mlp\)'. The 3 regions before it .* Resume it with"
    with pytest.raises(RuntimeError, match=said):
        stopped.train()
    resumed = trainer_of(tmp_path / "halves", save_strategy="steps")
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed.model, whole.model)
    with pytest.raises(RuntimeError, match='Nothing was kept, because `save_strategy="no"`. Load the model again'):
        trainer_of(tmp_path / "none", callbacks=[StopAt(1)]).train()


@pytest.mark.parametrize("path", [True, "reconstructoin"])
def test_resuming_where_nothing_was_kept_is_refused(tmp_path, path):
    where = "reconstruction" if path is True else path
    with pytest.raises(
        ValueError, match=f"Expected '.*{where}' to hold the finished regions of a reconstruction, found none"
    ):
        trainer_of(tmp_path).train(resume_from_checkpoint=path)


def test_without_resuming_a_run_starts_again(tmp_path):
    first = trainer_of(tmp_path, save_strategy="steps")
    first.train()
    assert (tmp_path / "reconstruction" / "fingerprint.json").exists()
    second = trainer_of(tmp_path, save_strategy="steps", learning_rate=1e-3)
    second.train()
    assert len(logged(second, "loss")) == 12


def test_nothing_is_kept_where_nothing_is_to_be_saved(tmp_path):
    trainer_of(tmp_path / "out").train()
    assert not (tmp_path / "out" / "reconstruction").exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 1e-3},
        {"weight_decay": 0.1},
        {"lr_scheduler_type": "cosine"},
        {"warmup_steps": 2},
        {"optim": "sgd"},
    ],
    ids=named,
)
def test_resuming_with_other_arguments_is_refused(tmp_path, changed):
    trainer_of(tmp_path, save_strategy="steps", max_steps=1).train()
    with pytest.raises(ValueError, match="holds the state of a run with another arguments"):
        trainer_of(tmp_path, save_strategy="steps", max_steps=1, **changed).train(resume_from_checkpoint=True)


# -- refusals --------------------------------------------------------------------------------------------------------


REFUSALS = [
    ({"recovery": "rest"}, ValueError, "`recovery` must be one of 'retrain', 'reconstruct', .* got 'rest'"),
    ({"reconstruction_region": "layer"}, ValueError, "`region` must be .* got 'layer'"),
    ({"reconstruction_region": "0"}, ValueError, "`region` must be .* got 0"),
    ({"reconstruction_mode": "DS"}, ValueError, "`mode` must be one of 'DD', 'SS', 'SD', got 'DS'"),
    ({"reconstruction_loss": "ce"}, ValueError, "`loss` must be one of 'mse', 'relative_mse', 'cosine', got 'ce'"),
    (
        {"reconstruction_region": "matrix", "reconstruction_mode": "SD"},
        ValueError,
        '`region="matrix"` solves a least-squares problem',
    ),
    ({"activations": "gpu"}, ValueError, "`activations` must be one of 'device', 'cpu', 'disk', got 'gpu'"),
    ({"fp16": True}, ValueError, "Reconstruction does not scale the loss, and `fp16` needs that. Use `bf16=True`"),
    ({"reconstruction_holdout": 1.0}, ValueError, r"`holdout` must be in \[0, 1\), got 1.0"),
    ({"calibration_samples": 0}, ValueError, "`calibration_samples` must be at least 1, got 0"),
]


@pytest.mark.parametrize(("given", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_bad_arguments_are_refused_before_anything_is_loaded(tmp_path, given, error, words):
    with pytest.raises(error, match=words):
        arguments(tmp_path, **given)


def test_adapters_are_not_attached_beforehand(tmp_path):
    model = get_peft_model(lively("llama"), MaskLoRAConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="attaches and merges an adapter for each region, .* Pass the plain model"):
        trainer_of(tmp_path, model)


def test_training_data_is_needed_and_enough_of_it(tmp_path):
    with pytest.raises(ValueError, match="Calibration uses the first 8 samples of `train_dataset`, and there is none"):
        SparseTrainer(lively("llama"), arguments(tmp_path)).train()
    with pytest.raises(ValueError, match="`calibration_samples=11` needs as many .* has only 10"):
        trainer_of(tmp_path, calibration_samples=11).train()


def test_the_report_is_ready_for_json(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.train()
    assert json.loads(json.dumps(trainer.reconstruction_report.to_dict()))["pruning"]["criterion"] == "magnitude"
