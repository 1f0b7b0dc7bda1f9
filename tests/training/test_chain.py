"""SparseTrainer(recovery="reconstruct,retrain") is one run, and what its two halves are apart; "none" only prunes."""

import pytest
import torch
from peft import get_peft_model

from peft_sparse import MaskLoRAConfig, SparseTrainer, prune, sparsity

from checks import assert_same_weights, assert_same_zeros, zeros_of
from rebuilding import lively
from trainers import StopAt, arguments


TUNER = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
FIRST = {"sparsity": 0.5, "criterion": "wanda", "calibration_samples": 8, "reconstruction_holdout": 0}
CHAIN = {
    **FIRST,
    "recovery": "reconstruct,retrain",
    "reconstruction_batch_size": 2,
    "reconstruction_learning_rate": 5e-3,
}


def samples(count=16, seed=1):
    tokens = torch.randint(0, 61, (count, 10), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in tokens]


def chain(path, model=None, *, data=None, tuner=True, callbacks=None, other=None, **changed):
    args = arguments(path, **CHAIN | {"save_strategy": "steps", "save_steps": 2} | changed)
    config = MaskLoRAConfig(**TUNER) if tuner else None
    model = lively("llama") if model is None and "model_init" not in (other or {}) else model
    return SparseTrainer(
        model, args, train_dataset=data or samples(), callbacks=callbacks, peft_config=config, **other or {}
    )


def halves(path):
    """The same work by two trainers."""
    first = SparseTrainer(
        lively("llama"),
        arguments(
            path / "first", **FIRST, recovery="reconstruct", per_device_train_batch_size=2, learning_rate=5e-3,
            max_steps=-1, num_train_epochs=1,
        ),
        train_dataset=samples(),
    )  # fmt: skip
    first.train()
    second = SparseTrainer(
        first.model,
        arguments(path / "second"),
        train_dataset=samples(),
        peft_config=MaskLoRAConfig(**TUNER),
    )
    second.train()
    return second.model


def entry_of(trainer):
    (entry,) = [entry for entry in trainer.state.log_history if "reconstructed" in entry]
    return entry


@pytest.mark.parametrize("recovery", ["reconstruct,retrain", ["reconstruct", "retrain"]], ids=["text", "list"])
def test_a_chain_is_its_two_halves(tmp_path, recovery):
    trainer = chain(tmp_path, recovery=recovery)
    given = trainer.model
    result = trainer.train()
    assert_same_weights(trainer.model, halves(tmp_path))
    assert result.global_step == 6
    assert trainer.model.get_base_model() is given
    assert trainer.pruning_report.criterion == "wanda"
    assert entry_of(trainer)["reconstruction_steps"] == 6 * 4
    zeros = zeros_of(given)
    merged = trainer.model.merge_and_unload()
    assert_same_zeros(merged, zeros)
    assert sparsity(merged) == 0.5


def test_without_an_adapter_all_weights_are_retrained_and_zeros_stay(tmp_path):
    trainer = chain(tmp_path, tuner=False)
    trainer.train()
    assert sparsity(trainer.model) == 0.5
    assert trainer.state.log_history[-1]["sparsity"] == 0.5


@pytest.mark.parametrize("stop", [5, 4], ids=["in the first half", "in the second half"])
def test_a_stopped_chain_ends_as_if_it_had_not_been_stopped(tmp_path, stop):
    whole = chain(tmp_path / "whole")
    whole.train()
    # Step 5 is in the second region. The second half has its own steps.
    stopped = chain(tmp_path / "stopped", callbacks=[_Killed(stop, half=1 if stop == 5 else 2)])
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = chain(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed.model, whole.model)
    assert entry_of(resumed)["reconstructed"] == entry_of(whole)["reconstructed"]


def test_retraining_resumes_from_a_named_checkpoint(tmp_path):
    whole = chain(tmp_path)
    whole.train()
    resumed = chain(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(resumed.model, whole.model)


def test_a_checkpoint_of_another_reconstruction_is_refused(tmp_path):
    chain(tmp_path).train()
    # A new run in the same folder that is stopped before its first checkpoint.
    with pytest.raises(KeyboardInterrupt):
        chain(tmp_path, data=samples(seed=2), callbacks=[_Killed(5, half=1)]).train()
    with pytest.raises(ValueError, match="continues the reconstruction .* delete the `checkpoint-\\*` folders"):
        chain(tmp_path, data=samples(seed=2)).train(resume_from_checkpoint=True)


def test_a_pruned_model_is_taught_by_its_teacher_in_the_first_half(tmp_path):
    model = lively("llama")
    prune(model, 0.5)
    zeros = zeros_of(model)
    trainer = chain(tmp_path, model, other={"teacher": lively("llama")})
    trainer.train()
    assert_same_zeros(trainer.model.merge_and_unload(), zeros)
    assert all(region.error < region.error_pruned for region in trainer.reconstruction_report.regions)


@pytest.mark.parametrize("given", [True, False], ids=["teacher", "copy"])
def test_logits_of_the_dense_model_teach_the_second_half(tmp_path, given):
    other = {"teacher": lively("llama")} if given else {}
    trainer = chain(tmp_path, distillation="logits", other=other)
    trainer.train()
    assert sparsity(trainer.teacher) == 0
    assert sparsity(trainer.model) == 0.5
    plain = chain(tmp_path / "plain")
    plain.train()
    assert entry_of(trainer)["reconstructed"] == entry_of(plain)["reconstructed"]
    assert trainer.state.log_history[1]["loss"] != plain.state.log_history[1]["loss"]


def test_the_rate_is_searched_for_retraining_alone(tmp_path):
    trainer = chain(tmp_path, find_learning_rate=True, per_device_train_batch_size=2, save_strategy="no")
    trainer.train()
    (found,) = [entry for entry in trainer.state.log_history if "found_learning_rate" in entry]
    assert trainer.args.learning_rate == found["found_learning_rate"]
    plain = chain(tmp_path / "plain", save_strategy="no", per_device_train_batch_size=2,
                  learning_rate=trainer.args.learning_rate)  # fmt: skip
    plain.train()
    assert_same_weights(trainer.model, plain.model)


def test_each_training_of_a_model_init_is_a_chain_of_its_own(tmp_path):
    trainer = chain(tmp_path, other={"model_init": lambda: lively("llama")}, save_strategy="no")
    trainer.train()
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert_same_weights(trainer.model, first)


@pytest.mark.parametrize("recovery", ["none", []], ids=["none", "empty list"])
def test_none_only_prunes(tmp_path, recovery):
    trainer = SparseTrainer(
        lively("llama"), arguments(tmp_path, **FIRST | {"recovery": recovery}), calibration_dataset=samples()
    )
    assert trainer.train().global_step == 0
    expected = lively("llama")
    prune(expected, 0.5, [{"input_ids": s["input_ids"][None]} for s in samples()[:8]], criterion="wanda")
    assert_same_weights(trainer.model, expected)
    assert trainer.pruning_report.sparsity == 0.5


@pytest.mark.parametrize("recovery", ["retrain", "reconstruct,retrain"])
def test_calibration_has_its_own_data_set_if_one_is_given(tmp_path, recovery):
    own = samples(seed=5)
    kept = [chain(tmp_path / str(i), recovery=recovery, other=other) for i, other in enumerate(
        ({"calibration_dataset": own}, {}))]  # fmt: skip
    for trainer in kept:
        trainer.train()
    ours, theirs = (zeros_of(trainer.model.unload()) for trainer in kept)
    assert any((ours[name] != theirs[name]).any() for name in ours)
    assert_same_zeros(_pruned_by(own), ours) if recovery == "retrain" else None


@pytest.mark.parametrize("recovery", ["none", "reconstruct"])
def test_tokens_that_a_mask_leaves_out_do_not_calibrate(tmp_path, recovery):
    """The model does not take `token_mask`, so `Trainer` would remove it."""
    plain = samples()
    masked = [s | {"token_mask": (torch.arange(10) < 6).long()} for s in plain]
    pruned = []
    for i, data in enumerate((masked, plain)):
        args = arguments(tmp_path / str(i), **FIRST | {"recovery": recovery, "max_steps": -1, "num_train_epochs": 1})
        trainer = SparseTrainer(lively("llama"), args, calibration_dataset=data)
        trainer.train()
        pruned.append(zeros_of(trainer.model))
    expected = lively("llama")
    calibration = [{"input_ids": s["input_ids"][None], "token_mask": s["token_mask"][None]} for s in masked[:8]]
    prune(expected, 0.5, calibration, criterion="wanda")
    first = next(name for name in pruned[0] if "q_proj" in name)
    assert torch.equal(pruned[0][first], zeros_of(expected)[first])
    assert not torch.equal(pruned[0][first], pruned[1][first])


def test_a_second_training_of_the_same_model_is_refused(tmp_path):
    trainer = chain(tmp_path)
    trainer.train()
    with pytest.raises(ValueError, match="has reconstructed its model and attached an adapter already. Make a new"):
        trainer.train()


def test_an_adapted_model_is_refused_before_anything_runs(tmp_path):
    adapted = get_peft_model(lively("llama"), MaskLoRAConfig(**TUNER))
    with pytest.raises(ValueError, match="Reconstruction attaches and merges an adapter for each region"):
        chain(tmp_path, adapted)


def _pruned_by(data):
    model = lively("llama")
    prune(model, 0.5, [{"input_ids": s["input_ids"][None]} for s in data[:8]], criterion="wanda")
    return model


class _Killed(StopAt):
    """Raises KeyboardInterrupt at a step of one half."""

    def __init__(self, step, half):
        super().__init__(step)
        self.half, self.begun = half, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun += 1

    def on_step_end(self, args, state, control, **kwargs):
        pass

    def on_step_begin(self, args, state, control, **kwargs):
        self._maybe(state)

    def on_log(self, args, state, control, **kwargs):
        self._maybe(state)

    def _maybe(self, state):
        if self.begun == self.half and state.global_step >= self.step:
            raise KeyboardInterrupt
