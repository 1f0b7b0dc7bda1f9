"""SparseTrainer(recovery="reconstruct") evaluates when it is asked to, and the reconstruction is the same."""

import random

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from peft_sparse import MaskLoRAConfig, SparseTrainer

from checks import assert_same_weights
from conftest import Samples
from rebuilding import lively
from trainers import arguments


OPTIONS = {
    "sparsity": 0.5,
    "recovery": "reconstruct",
    "calibration_samples": 8,
    "reconstruction_holdout": 0,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
}


def trained(path, model=None, callbacks=None, metrics=None, peft_config=None, **options):
    trainer = SparseTrainer(
        model or lively("llama"),
        arguments(path, **OPTIONS | options),
        train_dataset=Samples(),
        eval_dataset=Samples(4),
        callbacks=callbacks,
        compute_metrics=metrics,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def evaluations(trainer):
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


@pytest.mark.parametrize("config", [None, MaskLoRAConfig(r=2)], ids=["full", "MaskLoRA"])
@pytest.mark.parametrize("half", [False, True])
def test_evaluations_come_when_they_are_asked_for_and_change_nothing(tmp_path, config, half):
    class Loss(TrainerCallback):
        """The loss of the model at each step, by a plain pass."""

        def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
            tokens = Samples(4).tokens
            assert not model.training
            with torch.no_grad():
                by_hand.append((model(input_ids=tokens, labels=tokens).loss.item(), metrics["eval_loss"]))

    by_hand = []
    model, other = (lively("llama").to(torch.bfloat16 if half else torch.float32).train() for _ in range(2))
    without = trained(tmp_path, other, peft_config=config)
    state = random.getstate(), np.random.get_state()[1].copy()
    trainer = trained(
        tmp_path, model, [Loss()], peft_config=config, eval_strategy="steps", eval_steps=3, eval_on_start=True
    )
    assert random.getstate() == state[0]
    assert (np.random.get_state()[1] == state[1]).all()
    found = evaluations(trainer)
    assert [entry["step"] for entry in found] == [0, *range(3, 25, 3)]
    assert found[0]["eval_sparsity"] == 0
    assert found[-1]["eval_sparsity"] == 0.5
    assert all(measured == pytest.approx(expected, rel=1e-5) for expected, measured in by_hand)
    assert len(by_hand) == len(found)
    assert_same_weights(trainer.model, without.model)
    assert all(module.training for module in trainer.model.modules())
    assert not any("forward" in module.__dict__ for module in trainer.model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16 if half else torch.float32}


@pytest.mark.parametrize(
    ("region", "steps"),
    [("submodule", range(4, 25, 4)), ("block", range(4, 13, 4)), ("matrix", [0, 0, 0])],
)
def test_an_epoch_is_a_region(tmp_path, region, steps):
    trainer = trained(tmp_path, eval_strategy="epoch", reconstruction_region=region)
    found = evaluations(trainer)
    assert [entry["step"] for entry in found] == [*steps]
    shares = [entry["eval_sparsity"] for entry in found]
    assert shares == sorted(shares)
    assert shares[-1] == 0.5
    after = trainer.evaluate()
    assert after["eval_loss"] == pytest.approx(found[-1]["eval_loss"], rel=1e-5)


def test_metrics_and_full_evaluation_in_half_precision_are_as_elsewhere(tmp_path):
    def metrics(found):
        return {"right": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    options = {"eval_strategy": "steps", "eval_steps": 8, "bf16_full_eval": True}
    trainer = trained(tmp_path, metrics=metrics, metric_for_best_model="right", **options)
    assert [entry["step"] for entry in evaluations(trainer)] == [8, 16, 24]
    assert trainer.state.best_metric == max(entry["eval_right"] for entry in evaluations(trainer))
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert_same_weights(trainer.model, trained(tmp_path).model)


def test_a_resumed_run_evaluates_what_it_fits(tmp_path):
    class Interrupted(Exception):
        pass

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 14:
                raise Interrupted

    options = {"save_strategy": "steps", "eval_strategy": "epoch"}
    with pytest.raises(Interrupted):
        trained(tmp_path, callbacks=[Interrupt()], **options)
    args = arguments(tmp_path, **OPTIONS | options)
    trainer = SparseTrainer(lively("llama"), args, train_dataset=Samples(), eval_dataset=Samples(4))
    trainer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in evaluations(trainer)] == [16, 20, 24]
