"""A run may end anywhere: what training changed besides the weights is as it was, and the next run begins anew."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from peft_sparse import (
    FreezingCallback,
    MaskLoRAConfig,
    PruningCallback,
    SparseTrainer,
    SparseTrainingArguments,
    ZeroGuardCallback,
    prune,
    sparsity,
)
from peft_sparse.training.termination import TerminationCallback

from checks import assert_same_weights
from conftest import Samples, tiny
from forking import ended, forked
from trainers import arguments, importing


class Raises(TrainerCallback):
    """Raises each of `errors` once, at the event `event` of a step."""

    def __init__(self, *errors, event="on_step_end", step=5):
        self.errors, self.step = list(errors), step
        setattr(self, event, self._raise)

    def _raise(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step and self.errors:
            for module in model.modules():
                # As code does that compares with the base model, and does not come to its end.
                if isinstance(module, BaseTunerLayer):
                    module.enable_adapters(False)
            raise self.errors.pop()


def settings(model):
    return {
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": [name for name, p in model.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks],
        "adapters": {n: m._disable_adapters for n, m in model.named_modules() if hasattr(m, "_disable_adapters")},
        "sigterm": signal.getsignal(signal.SIGTERM),
    }


def sparse(model, path, *callbacks, **options):
    args = arguments(path, save_on_sigterm=True, **options)
    return SparseTrainer(model, args, train_dataset=Samples(), callbacks=list(callbacks))


ENDS = [
    ("on_train_begin", RuntimeError("boom")),
    ("on_substep_end", KeyboardInterrupt()),
    ("on_pre_optimizer_step", SystemExit(1)),
    ("on_step_end", RuntimeError("boom")),
]


@pytest.mark.parametrize("adapted", [False, True], ids=["weights", "adapters"])
@pytest.mark.parametrize(("event", "end"), ENDS, ids=str)
def test_an_interrupted_run_leaves_the_model_as_it_was(tmp_path, llama, event, end, adapted):
    prune(llama, 0.5)
    model = get_peft_model(llama, MaskLoRAConfig(r=2, target_modules="all-linear")) if adapted else llama
    first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    first.grad = torch.ones_like(first)
    before = settings(model)
    step = 0 if event == "on_train_begin" else 4
    raises = Raises(end, event=event, step=step)
    callbacks = [FreezingCallback(), raises]
    with pytest.raises(type(end)):
        sparse(model, tmp_path, *callbacks, gradient_accumulation_steps=2, max_steps=6).train()
    assert settings(model) == before
    assert first.grad is before["gradients"][next(iter(before["gradients"]))]


@pytest.mark.parametrize("adapted", [False, True], ids=["weights", "adapters"])
def test_a_whole_run_leaves_modes_and_gradients_as_they_were(tmp_path, llama, adapted):
    model = get_peft_model(llama, MaskLoRAConfig(r=2, target_modules="all-linear")) if adapted else llama
    llama.model.layers[0].train()
    before = settings(model)
    sparse(model, tmp_path, FreezingCallback(), sparsity=0.5).train()
    assert settings(model) == before


def test_an_interrupted_reconstruction_leaves_the_model_as_it_was(tmp_path, llama):
    before = settings(llama)
    options = {"recovery": "reconstruct", "sparsity": 0.5, "calibration_samples": 4, "max_steps": 2}
    trainer = SparseTrainer(
        llama, arguments(tmp_path, **options), train_dataset=Samples(), callbacks=[Raises(KeyboardInterrupt())]
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert settings(llama) == before


@pytest.mark.parametrize("kind", [SparseTrainer, Trainer])
def test_a_retry_begins_clean(tmp_path, llama, kind):
    """`auto_find_batch_size` begins again after running out of memory, without an end of the first try."""
    prune(llama, 0.5)
    before = settings(llama)
    seen = []

    class Looks(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            seen.append((sum(p.requires_grad for p in model.parameters()), signal.getsignal(signal.SIGTERM)))

    callbacks = [FreezingCallback(), Looks(), Raises(torch.OutOfMemoryError("CUDA out of memory."))]
    which = TrainingArguments if kind is Trainer else SparseTrainingArguments
    args = arguments(tmp_path, which, auto_find_batch_size=True)
    if kind is Trainer:
        callbacks = [ZeroGuardCallback(), TerminationCallback(), *callbacks]
    trainer = kind(llama, args, train_dataset=Samples(), callbacks=callbacks)
    trainer.train()
    everything = len(list(llama.parameters()))
    assert [count for count, _ in seen] == [everything, everything]
    after = settings(llama)
    assert after["requires_grad"] == before["requires_grad"]
    assert after["hooks"] == before["hooks"] == []
    assert after["sigterm"] is before["sigterm"]


def test_a_second_training_begins_as_the_first_did(tmp_path):
    """Not with the momenta of the first: it ends as a new trainer of the same model would."""
    ends = []
    for again in (True, False):
        model = tiny("llama")
        prune(model, 0.5)
        trainer = SparseTrainer(model, arguments(tmp_path, max_steps=3), train_dataset=Samples())
        trainer.train()
        if not again:
            trainer = SparseTrainer(model, arguments(tmp_path, max_steps=3), train_dataset=Samples())
        set_seed(7)
        trainer.train()
        ends.append(model)
    assert_same_weights(*ends)


def test_an_optimiser_of_the_users_goes_on(tmp_path, llama):
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-3)
    trainer = SparseTrainer(
        llama, arguments(tmp_path, max_steps=2), train_dataset=Samples(), optimizers=(optimizer, None)
    )
    trainer.train()
    trainer.train()
    assert {int(state["step"]) for state in optimizer.state.values()} == {4}


def test_callbacks_of_a_plain_trainer_can_be_released(tmp_path, llama):
    prune(llama, 0.5)
    before = settings(llama)
    callbacks = [FreezingCallback(), TerminationCallback(), ZeroGuardCallback()]
    trainer = Trainer(
        llama,
        arguments(tmp_path, TrainingArguments),
        train_dataset=Samples(),
        callbacks=[*callbacks, Raises(OSError("stopped"))],
    )
    with pytest.raises(OSError, match="stopped"):
        trainer.train()
    assert settings(llama)["hooks"]
    for callback in callbacks:
        callback.release()
        callback.release()
    after = settings(llama)
    for what in ("requires_grad", "hooks", "sigterm"):
        assert after[what] == before[what], what


def die_by_sigterm(path, kind, handler="default"):
    """Train until an error, and then receive SIGTERM: what the process would have done without the training."""
    if handler == "python":
        signal.signal(signal.SIGTERM, lambda *args: os._exit(3))
    for _ in range(2):
        if kind == "plain":
            args = arguments(path, TrainingArguments)
            callbacks = [TerminationCallback(), Raises(OSError(), step=1)]
            trainer = Trainer(tiny("llama"), args, train_dataset=Samples(), callbacks=callbacks)
        else:
            trainer = sparse(tiny("llama"), path, Raises(OSError(), step=1))
        with contextlib.suppress(OSError):
            trainer.train()
    os.kill(os.getpid(), signal.SIGTERM)


def all_die_by_sigterm(folder):
    """Fork a process for each kind of trainer, with each kind of handler. Runs in a process without threads."""
    for kind, handler, expected in (("plain", "default", -signal.SIGTERM), ("sparse", "python", 3)):
        code = ended(forked(functools.partial(die_by_sigterm, Path(folder) / kind, kind, handler)))
        assert code == expected, (kind, handler, code)


@pytest.mark.slow
def test_sigterm_after_a_failed_training_ends_the_process(tmp_path):
    code = f"{importing(__file__)}\ntests.all_die_by_sigterm({str(tmp_path)!r})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_sigterm_in_a_forked_process_ends_it(tmp_path, llama):
    found = []

    class Forks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            found.append(ended(forked(lambda: signal.raise_signal(signal.SIGTERM))))

    sparse(llama, tmp_path, Forks(), max_steps=2).train()
    assert found == [-signal.SIGTERM] * 2


def test_an_error_takes_the_noise_off_the_embeddings(tmp_path, llama):
    trainer = sparse(llama, tmp_path, Raises(RuntimeError("boom"), step=1), neftune_noise_alpha=5.0)
    for _ in range(2):
        with contextlib.suppress(RuntimeError):
            trainer.train()
        embeddings = llama.get_input_embeddings()
        assert not embeddings._forward_hooks
        assert not hasattr(embeddings, "neftune_noise_alpha")


def test_zeros_that_a_callback_fills_after_the_guard_are_an_error(tmp_path, llama):
    class Averages(TrainerCallback):
        """Puts the dense weights back at the end, as an average over a run does."""

        def on_train_end(self, args, state, control, model=None, **kwargs):
            model.load_state_dict(dense)

    dense = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    trainer = sparse(llama, tmp_path, sparsity=0.5, max_steps=1)
    trainer.add_callback(Averages())
    with pytest.raises(RuntimeError, match="lost zeros during training"):
        trainer.train()


class Fills(torch.optim.SGD):
    """Fills zeros, as optimisers do that combine entries, and is interrupted in the middle of a step."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(1)
        raise KeyboardInterrupt


@pytest.mark.parametrize("kind", [SparseTrainer, Trainer])
def test_zeros_are_there_where_the_optimiser_was_interrupted(tmp_path, llama, kind):
    prune(llama, 0.5)
    guard = ZeroGuardCallback()
    args = arguments(tmp_path, SparseTrainingArguments if kind is SparseTrainer else TrainingArguments)
    trainer = kind(
        llama, args, train_dataset=Samples(), callbacks=[guard], optimizer_cls_and_kwargs=(Fills, {"lr": 1})
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    guard.release()
    assert sparsity(llama) == 0.5


@pytest.mark.parametrize("names", [["report.json"], ["report.html"], ["report.json", "report.html"]], ids=str)
def test_files_of_the_user_are_not_replaced_by_a_report(tmp_path, llama, caplog, names):
    for name in names:
        (tmp_path / name).write_text('{"accuracy": 1}')
    sparse(llama, tmp_path, max_steps=1).train()
    assert "report of the run is not written, because " + names[0] in caplog.text
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(names, '{"accuracy": 1}')


def test_a_report_is_replaced_by_the_next(tmp_path, llama):
    trainer = sparse(llama, tmp_path, max_steps=1)
    trainer.train()
    (tmp_path / "report.html").write_text("older")
    trainer.train()
    assert (tmp_path / "report.html").read_text() != "older"


def test_a_pruning_that_raises_puts_adapters_back(tmp_path, llama):
    def fails(weight, statistics):
        raise RuntimeError("no scores")

    model = get_peft_model(llama, MaskLoRAConfig(r=2, target_modules="all-linear"))
    before = settings(model)
    with pytest.raises(RuntimeError, match="no scores"):
        PruningCallback(0.5, criterion=fails).prune(model, 0)
    assert settings(model) == before
