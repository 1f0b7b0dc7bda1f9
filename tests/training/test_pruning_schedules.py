"""Pruning on the way: the sparsity rises by a schedule, zeros stay, adapters start anew in each cycle."""

from functools import partial

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from peft_sparse import (
    CubicSchedule,
    MaskLoRAConfig,
    PruningCallback,
    PruningCycles,
    ScaledLoRAConfig,
    SparseTrainer,
    ZeroGuardCallback,
    prune,
    sparsity,
)
from peft_sparse.training.base_weights import restart_adapters

from checks import assert_same_zeros, assert_zeros_kept, zeros_of
from conftest import Samples, tiny
from trainers import StopAt, arguments


arguments = partial(arguments, max_steps=12, logging_steps=1)


def adapt(config=MaskLoRAConfig, model=None, **kwargs):
    return get_peft_model(
        model or tiny("llama"), config(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **kwargs)
    )


class Watch(TrainerCallback):
    """Notes the sparsity after each optimiser step, and that no zero of the step before was lost."""

    def __init__(self):
        self.zeros, self.sparsities = None, []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.zeros is not None:
            assert_zeros_kept(model, self.zeros)
        self.zeros = zeros_of(model)
        self.sparsities.append(round(sparsity(model), 3))


def test_the_cubic_schedule_is_the_papers():
    schedule = CubicSchedule(rounds=2, interval=5, start=3, initial_sparsity=0.1)
    # 0.9 - 0.8 (1 - k/2)^3
    assert schedule.sparsities(0.9, 20) == pytest.approx({3: 0.1, 8: 0.8, 13: 0.9})


def test_cycles_prune_a_constant_fraction_of_what_remains():
    # p = 1 - 0.125^(1/3) = 0.5; ten steps in threes, one left over.
    assert PruningCycles(3).sparsities(0.875, 10) == pytest.approx({0: 0.5, 3: 0.75, 6: 0.875})
    assert PruningCycles(1).sparsities(0.3, 10) == pytest.approx({0: 0.3})


@pytest.mark.parametrize("guard_first", [False, True])
def test_the_sparsity_rises_in_a_plain_trainer_and_the_guard_follows(tmp_path, guard_first):
    model, watch = tiny("llama"), Watch()
    pruning = PruningCallback(0.75, schedule=CubicSchedule(rounds=2, interval=3, start=2), group="matrix")
    callbacks = [ZeroGuardCallback(), pruning, watch] if guard_first else [pruning, ZeroGuardCallback(), watch]
    args = arguments(tmp_path, TrainingArguments, weight_decay=0.1)
    trainer = Trainer(model, args, train_dataset=Samples(), callbacks=callbacks)
    trainer.train()
    # Steps 1, 2; 3 to 5 at s_i = 0; then 0.75 (1 - 0.5^3), rounded down in each matrix; then 0.75.
    assert watch.sparsities == [0.0] * 5 + [0.656] * 3 + [0.75] * 4
    noted = {entry["step"]: entry["pruning"] for entry in trainer.state.log_history if "pruning" in entry}
    assert noted == pytest.approx({5: 0.656, 8: 0.75}, abs=1e-3)
    for parameter, state in trainer.optimizer.state.items():
        if parameter.dim() == 2 and (parameter == 0).any() and "exp_avg" in state:
            assert (state["exp_avg"][parameter == 0] == 0).all()


def test_cycles_merge_prune_and_start_the_adapters_anew(tmp_path):
    model, watch = adapt(ScaledLoRAConfig, train_norms=True), Watch()
    parameters = [p for p in model.parameters() if p.requires_grad]

    class Restarted(TrainerCallback):
        steps = 0

        def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step in (0, 4, 8):
                self.steps += 1
                assert not optimizer.state
                layer = model.get_base_model().model.layers[0].mlp.up_proj
                assert not layer.merged
                torch.testing.assert_close(layer.merged_weight(["default"]), layer.get_base_weight())

    restarted = Restarted()
    callbacks = [watch, PruningCallback(0.875, schedule=PruningCycles(3)), ZeroGuardCallback(), restarted]
    trainer = Trainer(model, arguments(tmp_path, TrainingArguments), train_dataset=Samples(), callbacks=callbacks)
    trainer.train()
    assert restarted.steps == 3
    assert watch.sparsities == [0.5] * 4 + [0.75] * 4 + [0.875] * 4
    assert [p for p in model.parameters() if p.requires_grad] == parameters
    zeros = zeros_of(model)
    merged = model.merge_and_unload()
    assert_same_zeros(merged, zeros)
    assert round(sparsity(merged), 3) == 0.875


@pytest.mark.parametrize("config", [MaskLoRAConfig, ScaledLoRAConfig])
def test_starting_anew_does_not_change_what_the_model_computes(config):
    model = adapt(config, init_weights=False)
    prune(model, 0.5)
    tokens, zeros = Samples().tokens, zeros_of(model)
    before = model.eval()(tokens).logits
    dense = model.get_base_model().model.layers[0].mlp.up_proj.get_base_weight().clone()
    restart_adapters(model)
    torch.testing.assert_close(model(tokens).logits, before)
    assert not torch.equal(model.get_base_model().model.layers[0].mlp.up_proj.get_base_weight(), dense)
    assert_same_zeros(model, zeros)
    with model.disable_adapter():
        torch.testing.assert_close(model(tokens).logits, before)


@pytest.mark.parametrize(("stop", "left"), [(2, 2), (4, 0)])
def test_a_run_that_stops_before_its_last_pruning_says_so(tmp_path, llama, caplog, stop, left):
    args = arguments(tmp_path, sparsity=0.6, pruning_schedule="cubic", pruning_rounds=4)
    SparseTrainer(llama, args, train_dataset=Samples(), callbacks=[StopAt(stop)]).train()
    told = f"stopped after step {stop}, and the schedule prunes {left} more times, to sparsity 0.6. Resume"
    assert (told in caplog.text) == (left > 0)


def test_cycles_with_adapters_through_the_arguments(tmp_path):
    options = {"sparsity": 0.75, "pruning_schedule": "cycles", "pruning_rounds": 2, "criterion": "wanda"}
    args = arguments(tmp_path, calibration_samples=4, **options)
    trainer = SparseTrainer(adapt(), args, train_dataset=Samples())
    trainer.train()
    found = [entry["sparsity"] for entry in trainer.state.log_history if "loss" in entry]
    # Pruning at the end of step 6 comes before its log.
    assert found == pytest.approx([0.5] * 5 + [0.75] * 7, abs=0.01)
    assert trainer.pruning_report.criterion == "wanda"
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


# TRL's own default.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_trl_trains_by_the_same_callbacks(tmp_path):
    import datasets
    import trl

    words = {f"w{index}": index for index in range(61)} | {"?": 61, "</s>": 62}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    trainer = trl.SFTTrainer(
        tiny("llama"),
        arguments(tmp_path, trl.SFTConfig),
        train_dataset=datasets.Dataset.from_list([{"input_ids": row.tolist()} for row in Samples().tokens]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", eos_token="</s>"),
        peft_config=MaskLoRAConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[PruningCallback(0.75, schedule=PruningCycles(2)), ZeroGuardCallback()],
    )
    trainer.train()
    assert round(sparsity(trainer.model), 3) == 0.75
