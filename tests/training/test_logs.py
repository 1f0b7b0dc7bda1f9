"""What SparseTrainer writes into the log of a run is true, and stands under the names that Trainer's users expect."""

import contextlib
import io

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import TrainerCallback

from peft_sparse import MaskLoRAConfig, PruningCallback, SparseTrainer, prune, sparsity
from peft_sparse.model.environment import remembered

from conftest import Samples, tiny
from trainers import StopAt, arguments


def pruned(share=0.5):
    model = tiny("llama")
    prune(model, share)
    return model


def trainer_of(path, model, eval_dataset=None, **options):
    args = arguments(path, **options)
    return SparseTrainer(model, args, train_dataset=Samples(), eval_dataset=eval_dataset or Samples(4))


def shares(history):
    """The entries about sparsity, by their names, each with its step."""
    found = {}
    for entry in history:
        for name in entry:
            if name.endswith("sparsity"):
                found.setdefault(name, []).append((entry["step"], entry[name]))
    return found


def test_evaluations_and_predictions_name_their_sparsity(tmp_path):
    trainer = trainer_of(tmp_path, pruned())
    assert trainer.evaluate()["eval_sparsity"] == 0.5
    trainer.train()
    metrics = trainer.evaluate()
    assert [name for name in metrics if "sparsity" in name] == ["eval_sparsity"]
    assert trainer.predict(Samples(4)).metrics["test_sparsity"] == 0.5
    several = trainer.evaluate({"first": Samples(4), "second": Samples(6)})
    assert several["eval_first_sparsity"] == several["eval_second_sparsity"] == 0.5
    for entry in trainer.state.log_history:
        names = [name for name in entry if name.endswith("sparsity")]
        assert names == (["sparsity"] if "loss" in entry or "train_loss" in entry else names)
        assert len(names) == 1


def test_the_best_model_can_be_chosen_by_sparsity(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", "metric_for_best_model": "sparsity"}
    trainer = trainer_of(tmp_path, tiny("llama"), sparsity=0.6, pruning_schedule="cubic", pruning_rounds=3, **options)
    trainer.train()
    found = shares(trainer.state.log_history)
    assert [step for step, _ in found["eval_sparsity"]] == [2, 4, 6]
    assert trainer.state.best_metric == found["eval_sparsity"][-1][1] == pytest.approx(0.6, abs=0.01)


def test_every_sparsity_is_that_of_the_model_at_its_step(tmp_path):
    seen = []

    class Recording(SparseTrainer):
        def log(self, logs, start_time=None):
            super().log(logs, start_time)
            seen.append((logs.get("sparsity", logs.get("eval_sparsity")), sparsity(self.model)))

    args = arguments(tmp_path, sparsity=0.6, pruning_schedule="cycles", pruning_rounds=2, logging_steps=1,
                     eval_strategy="steps", eval_steps=1, eval_on_start=True)  # fmt: skip
    model = get_peft_model(tiny("llama"), MaskLoRAConfig(r=2, target_modules=["q_proj", "up_proj"]))
    trainer = Recording(model, args, train_dataset=Samples(), eval_dataset=Samples(4))
    trainer.train()
    for change in (model.merge_adapter, model.unmerge_adapter):
        change()
        trainer.evaluate()
    prune(model, 0.8)
    trainer.evaluate()
    assert len({logged for logged, _ in seen}) > 2
    assert all(logged == pytest.approx(counted, abs=1e-6) for logged, counted in seen)
    assert seen[-1][0] == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_pruning_before_training_is_in_the_history(tmp_path, adapted):
    config = MaskLoRAConfig(r=2, target_modules="all-linear") if adapted else None
    options = {"sparsity": 0.5, "save_strategy": "steps", "save_steps": 3}
    trainers = [
        SparseTrainer(tiny("llama"), arguments(tmp_path, **options), train_dataset=Samples(), peft_config=config)
        for _ in range(2)
    ]
    trainers[0].train()
    trainers[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for trainer in trainers:
        entries = [entry for entry in trainer.state.log_history if "pruning" in entry]
        assert [(entry["step"], entry["pruning"]) for entry in entries] == [(0, 0.5)]
        assert 0 < entries[0]["norm_drop"] < 1
    # The second run of a trainer finds a pruned model.
    trainers[0].train()
    assert not any("pruning" in entry for entry in trainers[0].state.log_history)


def test_a_run_that_begins_again_after_an_error_has_its_pruning_in_the_history(tmp_path):
    class NoMemory(TrainerCallback):
        raised = False

        def on_step_end(self, *args, **kwargs):
            if not self.raised:
                self.raised = True
                raise torch.OutOfMemoryError("CUDA out of memory.")

    args = arguments(tmp_path, sparsity=0.5, auto_find_batch_size=True)
    trainer = SparseTrainer(tiny("llama"), args, train_dataset=Samples(), callbacks=[NoMemory()])
    trainer.train()
    assert [entry["pruning"] for entry in trainer.state.log_history if "pruning" in entry] == [0.5]


def test_each_pruning_by_model_init_is_in_the_history_of_its_run(tmp_path):
    options = {"sparsity": 0.5, "max_steps": 1}
    trainer = SparseTrainer(
        args=arguments(tmp_path, **options), model_init=lambda: tiny("llama"), train_dataset=Samples()
    )
    for _ in range(2):
        trainer.train()
        assert [entry["pruning"] for entry in trainer.state.log_history if "pruning" in entry] == [0.5]


def test_a_model_without_prunable_weights_is_evaluated_too(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(61, 61)

        def forward(self, input_ids, labels):
            logits = self.embed(input_ids)
            return {"loss": nn.functional.cross_entropy(logits.transpose(1, 2), labels), "logits": logits}

    metrics = trainer_of(tmp_path, Plain()).evaluate()
    assert torch.tensor(metrics["eval_loss"]).isfinite()
    assert "eval_sparsity" not in metrics


def test_the_report_is_that_of_the_last_pruning_whoever_asked_for_it(tmp_path):
    for options, share in (({}, 0.7), ({"sparsity": 0.5}, 0.7)):
        args = arguments(tmp_path, max_steps=1, **options)
        callbacks = [PruningCallback(0.7)]
        with contextlib.redirect_stderr(io.StringIO()):  # transformers tells that there are two
            trainer = SparseTrainer(tiny("llama"), args, train_dataset=Samples(), callbacks=callbacks)
        trainer.train()
        assert (
            trainer.pruning_report.sparsity == pytest.approx(sparsity(trainer.model)) == pytest.approx(share, abs=3e-3)
        )
        assert trainer.run_report().stages[0].sparsity == trainer.pruning_report.sparsity


def told(trainer):
    return remembered(trainer.model)["retraining"]


def test_the_card_tells_what_was_trained(tmp_path):
    class Full(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if trainer._train_batch_size == 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer = trainer_of(tmp_path, pruned(), auto_find_batch_size=True, eval_strategy="steps", eval_steps=2)
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad_("norm" in name)
    trainer.add_callback(Full())
    trainer.add_callback(StopAt(3))
    trainer.train()
    # The evaluation was before the last step.
    expected = {"steps": 3, "batch_size": 3, "trained": "some weights", "eval_loss": None}
    assert {name: told(trainer)[name] for name in expected} == expected


def test_the_card_tells_of_the_best_model_where_it_is_loaded(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "first", "greater_is_better": True}
    trainer = trainer_of(tmp_path, pruned(), **options, **best)
    trainer.compute_metrics = lambda found: {"first": -trainer.state.global_step}
    trainer.train()
    assert trainer.state.best_global_step == told(trainer)["steps"] == 1
    assert told(trainer)["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])
    assert told(trainer)["trained"] == "all weights"


def test_the_card_tells_the_rate_that_was_used(tmp_path):
    model = pruned()
    optimizers = (torch.optim.SGD(model.parameters(), lr=0.125), None)
    trainer = SparseTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=Samples(), optimizers=optimizers)
    trainer.train()
    assert told(trainer)["learning_rate"] == 0.125
    trainer = trainer_of(tmp_path, pruned(), max_steps=2, retraining_schedule="ft", original_steps=10)
    trainer.train()
    assert told(trainer)["learning_rate"] is None
