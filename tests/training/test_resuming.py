"""A run that is resumed from a checkpoint ends as a run that was never interrupted, in every way of training."""

from functools import partial

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_sparse import (
    FreezingCallback,
    MaskLoRAConfig,
    PruningCallback,
    SparseTrainer,
    ZeroGuardCallback,
    prune,
    sparsity,
)

from checks import assert_same_weights
from conftest import Samples, tiny
from trainers import StopAt, arguments


arguments = partial(arguments, logging_steps=1, save_strategy="steps")
mask_lora = partial(MaskLoRAConfig, r=2, target_modules="all-linear", task_type="CAUSAL_LM")
MEASURED = {"sparsity": 0.5, "criterion": "wanda", "calibration_samples": 4}
CUBIC = {"sparsity": 0.75, "pruning_schedule": "cubic", "pruning_rounds": 2, "pruning_interval": 2}
CYCLES = {"sparsity": 0.75, "pruning_schedule": "cycles", "pruning_rounds": 3}
ALLR = {"retraining_schedule": "allr", "original_steps": 20}


def trains(config=None, family="llama", callbacks=list, base=None, **options):
    """Return a function that makes the trainer of a first or of a resumed run."""

    def trainer(path, resumed):
        model = tiny(family)
        if config is not None:
            torch.manual_seed(0)
            model = get_peft_model(model, config)
        if resumed and base is not None:
            base(model)
        return SparseTrainer(model, arguments(path, **options), train_dataset=Samples(), callbacks=callbacks())

    return trainer


def by_model_init(path, resumed):
    options = {"train_dataset": Samples(), "model_init": lambda: tiny("llama"), "peft_config": mask_lora()}
    return SparseTrainer(args=arguments(path, sparsity=0.5), **options)


def plain_trainer(path, resumed):
    calibration = Samples().tokens[:4]
    callbacks = [PruningCallback(0.5, calibration, criterion="sparsegpt"), ZeroGuardCallback()]
    return Trainer(tiny("llama"), arguments(path, TrainingArguments), train_dataset=Samples(), callbacks=callbacks)


# Whole layers that PEFT copies and trains.
COPIES = MaskLoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"])
BIASES = mask_lora(train_norms=True, bias="all")
# Schedules prune to 0.75 at steps 2 and 4 (cubic) or 0, 2 and 4 (cycles).
CASES = {
    "adapters, biases and norms": (trains(BIASES, "opt", **MEASURED), 3),
    "the same on a base that is pruned already": (
        trains(
            BIASES,
            "opt",
            base=lambda m: prune(m, 0.5, criterion="wanda", calibration=Samples().tokens[:4]),
            **MEASURED,
        ),
        3,
    ),
    "model_init": (by_model_init, 2),
    "weights": (trains(sparsity=0.5, criterion="sparsegpt", calibration_samples=4), 3),
    "weights in a plain trainer": (plain_trainer, 3),
    "copies of layers": (trains(COPIES, **MEASURED), 3),
    "copies of layers, cubic": (trains(COPIES, criterion="wanda", calibration_samples=4, **CUBIC), 4),
    "cubic": (trains(**CUBIC), 2),
    "cubic with adapters": (trains(mask_lora(), **CUBIC), 2),
    "cubic with adapters on a measured base": (
        trains(mask_lora(), criterion="wanda", calibration_samples=4, **CUBIC),
        4,
    ),
    "cycles": (trains(**CYCLES), 3),
    "cycles with adapters": (trains(mask_lora(), **CYCLES), 2),
    "cycles with adapters on some layers": (trains(mask_lora(target_modules=["q_proj", "v_proj"]), **CYCLES), 3),
    "unfreezing": (trains(sparsity=0.5, callbacks=lambda: [FreezingCallback("unfreeze")]), 3),
    "distillation": (trains(sparsity=0.5, distillation="logits"), 4),
    "rates by the pruning": (trains(sparsity=0.6, **ALLR), 3),
    "rates by the pruning of each cycle": (trains(**CYCLES, **ALLR), 3),
}


def logged(trainer):
    names = ("step", "loss", "learning_rate", "sparsity")
    return [[entry.get(name) for name in names] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, case):
    made, stop = CASES[case]
    monkeypatch.setitem(arguments.keywords, "save_steps", stop)
    whole = made(tmp_path, resumed=False)
    whole.train()
    resumed = made(tmp_path, resumed=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert_same_weights(whole.model, resumed.model)
    assert logged(resumed) == logged(whole)
    if case == "distillation":
        saved = sum(file.stat().st_size for file in (tmp_path / "checkpoint-6").glob("model*.safetensors"))
        assert saved < 1.2 * sum(parameter.nbytes for parameter in whole.model.parameters()), "the teacher was saved"
    assert sparsity(resumed.model) == pytest.approx(getattr(resumed.args, "sparsity", 0.5), abs=3e-3)


def test_what_training_brought_to_zero_is_no_other_mask(tmp_path):
    class Zeroes(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.model.layers[1].mlp.down_proj.weight[0] = 0

    first, second = (
        trains(base=lambda model: prune(model, 0.5), callbacks=lambda these=these: these, save_steps=2)(
            tmp_path, resumed=True
        )
        for these in ([Zeroes(), StopAt(2)], [])
    )
    first.train()
    second.train(resume_from_checkpoint=True)


def test_other_zeros_are_refused(tmp_path):
    trains(mask_lora(), sparsity=0.5, max_steps=1)(tmp_path, resumed=False).train()
    other = trains(mask_lora(), sparsity=0.5, criterion="random")(tmp_path, resumed=True)
    with pytest.raises(ValueError, match="masks of the checkpoint and of the model differ in 21 weights, .* 'model"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("config", [None, mask_lora()], ids=["full", "MaskLoRA"])
@pytest.mark.parametrize("asked", [0.7, 0.8])
def test_a_schedule_that_cannot_reach_its_sparsity_any_more_is_refused(config, asked, tmp_path):
    trains(config, **CYCLES)(tmp_path, resumed=False).train()
    other = trains(config, **CYCLES | {"sparsity": asked})(tmp_path, resumed=True)
    with pytest.raises(ValueError, match="pruned to sparsity 0.75 by step 6, and is to end at"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("asked", [0.3, 0.8])
def test_one_pruning_to_another_sparsity_is_refused(asked, tmp_path):
    # The weights of the checkpoint replace those that were pruned now, so that report and card would be wrong.
    trains(sparsity=0.5, max_steps=1)(tmp_path, resumed=False).train()
    other = trains(sparsity=asked)(tmp_path, resumed=True)
    with pytest.raises(ValueError, match="pruned to sparsity 0.5 by step 1, and is to end at"):
        other.train(resume_from_checkpoint=True)


def test_a_guard_given_twice_still_compares_masks(tmp_path):
    def guarded(resumed, target):
        trainer = trains(mask_lora(target_modules=["q_proj"]), base=lambda m: prune(m, 0.5, target_modules=target))
        made = trainer(tmp_path, resumed=True)
        made.args.max_steps = 2 if resumed else 1
        made.callback_handler.callbacks.append(ZeroGuardCallback())
        return made

    guarded(False, ["up_proj"]).train()
    with pytest.raises(ValueError, match="masks of the checkpoint and of the model differ"):
        guarded(True, ["down_proj"]).train(resume_from_checkpoint=True)
