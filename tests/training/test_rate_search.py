import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from transformers import TrainerCallback

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, SparseTrainer, ZeroGuardCallback, prune
from peft_sparse.training import rate_search
from peft_sparse.training.rate_search import best_rate

from checks import assert_same_weights
from conftest import tiny
from trainers import arguments, in_two_processes


arguments = partial(arguments, logging_steps=1, learning_rate=1e-3, max_steps=3)
adapter = partial(get_peft_model, peft_config=MaskLoRAConfig(r=2, target_modules="all-linear", train_norms=True))


class Counting(torch.utils.data.Dataset):
    """Sequences that count upwards, so that training lowers the loss of sequences that it has not seen."""

    def __init__(self, count=64):
        self.tokens = (torch.arange(count)[:, None] + torch.arange(10)) % 17

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Normed(nn.Module):
    """A model with statistics that training changes, and with dropout."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Embedding(17, 16), nn.Linear(16, 32), nn.BatchNorm1d(10), nn.Dropout(0.2), nn.Linear(32, 17)
        )

    def forward(self, input_ids, labels):
        logits = self.layers(input_ids)
        return {"loss": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


def pruned(model):
    prune(model, 0.5)
    return model


def with_momenta(model):
    """An optimiser that has trained before, and has a rate of its own for each group."""
    first, *others = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([{"params": [first], "lr": 4e-3}, {"params": others}], lr=1e-3)
    for parameter in (first, *others):
        parameter.grad = torch.randn_like(parameter) / 100
    optimizer.step()
    return optimizer


# What is trained, the arguments, and an optimiser to pass.
CASES = {
    "an adapter": (lambda: adapter(pruned(tiny("llama"))), {}, None),
    "all weights": (lambda: pruned(tiny("llama")), {"lr_scheduler_type": "cosine", "seed": 5}, None),
    "accumulation": (
        lambda: adapter(pruned(tiny("llama"))),
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "warmup_steps": 2, "weight_decay": 0.1},
        None,
    ),
    "pruning and distillation": (
        lambda: adapter(tiny("llama")),
        {"sparsity": 0.5, "distillation": "logits", "max_grad_norm": 0.0},
        None,
    ),
    "statistics and dropout": (Normed, {"per_device_train_batch_size": 8, "target_modules": ["layers.1"]}, None),
    "an optimiser that is passed": (lambda: pruned(tiny("llama")), {}, with_momenta),
    "a schedule that looks at the loss": (
        lambda: pruned(tiny("llama")),
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2},
        None,
    ),
}


class Watch(TrainerCallback):
    """Notes the random numbers that each step would draw."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, **kwargs):
        with torch.random.fork_rng():
            self.seen.append((torch.rand(1).item(), random.getstate(), np.random.get_state()[2]))


def trained(case, path, **options):
    made, given_options, optimizer = CASES[case]
    torch.manual_seed(0)
    model, watch = made(), Watch()
    passed = (None if optimizer is None else optimizer(model), None)
    args = arguments(path, **(given_options | options))
    if passed[0] is not None and not args.find_learning_rate:
        # The rates that the search gives to each group.
        for group in passed[0].param_groups:
            group["lr"] *= args.learning_rate / passed[0].defaults["lr"]
    data = {"train_dataset": Counting(), "eval_dataset": Counting(8)}
    trainer = SparseTrainer(model, args, **data, callbacks=[watch], optimizers=passed)
    trainer.train()
    return trainer, watch


@pytest.mark.parametrize("case", CASES)
def test_a_search_leaves_nothing_but_its_rate(tmp_path, case):
    searched, watch = trained(case, tmp_path, find_learning_rate=True)
    history = searched.state.log_history
    [entry] = [entry for entry in history if "found_learning_rate" in entry]
    rate = entry["found_learning_rate"]
    assert rate == searched.args.learning_rate != 1e-3
    assert entry["step"] == 0
    assert entry["search_steps"] >= 25
    plain, other = trained(case, tmp_path, learning_rate=rate)
    assert_same_weights(searched.model, plain.model)
    assert str(watch.seen) == str(other.seen)
    for one, two in zip(*([e for e in t.state.log_history if "loss" in e] for t in (searched, plain)), strict=True):
        assert {**one, "epoch": 0} == {**two, "epoch": 0}


@pytest.mark.parametrize("start", [1e-5, 1e-2])
def test_the_result_hardly_depends_on_the_first_rate(tmp_path, start):
    model = adapter(pruned(tiny("llama")))
    args = arguments(tmp_path, find_learning_rate=True, learning_rate=start, max_steps=1)
    SparseTrainer(model, args, train_dataset=Counting()).train()
    assert args.learning_rate == pytest.approx(0.04, rel=0.2)


@given(st.floats(-5, 0), st.floats(-3.5, 3.5), st.floats(1, 3))
def test_the_lowest_loss_is_found(optimum, off, width):
    calls = []

    def loss_at(rate):
        calls.append(rate)
        distance = (math.log10(rate) - optimum) / width
        # Above the optimum the loss explodes, and far below it nothing changes.
        return 5 - 3 * math.exp(-(distance**2)) if distance < 0.5 else math.nan if distance > 0.7 else 8.0

    found = best_rate(loss_at, 10 ** (optimum + off), untrained=5.0)
    assert math.log10(found) == pytest.approx(optimum, abs=0.2)
    assert len(calls) == len(set(calls)) <= 5 + 2 * abs(off) / math.log10(4)


def test_a_parabola_is_met_exactly():
    assert best_rate(lambda rate: math.log(rate / 0.003) ** 2, 1e-3, 100.0) == pytest.approx(0.003)


def test_a_search_that_fails_leaves_the_model_as_it_was(tmp_path):
    class Fails(SparseTrainer):
        calls = 0

        def training_step(self, *args, **kwargs):
            self.calls += 1
            if self.calls == 4:
                raise RuntimeError("a fault")
            return super().training_step(*args, **kwargs)

    model, untouched = pruned(tiny("llama")), pruned(tiny("llama"))
    trainer = Fails(model, arguments(tmp_path, find_learning_rate=True), train_dataset=Counting())
    with pytest.raises(RuntimeError, match="a fault"):
        trainer.train()
    assert_same_weights(model, untouched)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_resumed_run_uses_the_rate_of_the_first(tmp_path, monkeypatch):
    def trainer():
        torch.manual_seed(0)
        options = {"find_learning_rate": True, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
        # A schedule that does not scale with the rate.
        options |= {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-3}}
        args = arguments(tmp_path, **options)
        return SparseTrainer(adapter(pruned(tiny("llama"))), args, train_dataset=Counting())

    whole = trainer()
    whole.train()
    monkeypatch.setattr(rate_search, "best_rate", lambda *args: pytest.fail("searched again"))
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.args.learning_rate == whole.args.learning_rate
    assert_same_weights(whole.model, resumed.model)
    rates = [[e.get("learning_rate") for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert rates[0] == rates[1]


def test_each_model_of_model_init_is_searched(tmp_path):
    args = arguments(tmp_path, find_learning_rate=True, sparsity=0.5, max_steps=2)
    config = ScaledLoRAConfig(r=2, target_modules="all-linear")
    options = {"train_dataset": Counting(), "peft_config": config, "model_init": lambda: tiny("llama")}
    trainer = SparseTrainer(args=args, **options)
    found = []
    for _ in range(2):
        args.learning_rate = 1e-2
        trainer.train()
        found.append(args.learning_rate)
    assert found[0] == found[1] != 1e-2
    next(c for c in trainer.callback_handler.callbacks if isinstance(c, ZeroGuardCallback)).check()


def search_in_a_process(folder):
    args = arguments(folder, find_learning_rate=True, max_steps=2)
    trainer = SparseTrainer(adapter(pruned(tiny("llama"))), args, train_dataset=Counting())
    trainer.train()
    weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    torch.save((args.learning_rate, weights), f"{folder}/{args.process_index}.pt")


@pytest.mark.slow
def test_all_processes_use_the_same_rate(tmp_path):
    in_two_processes(tmp_path, __file__, f"search_in_a_process({str(tmp_path)!r})")
    (rate, weights), (other, others) = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert rate == other != 1e-3
    assert all(torch.equal(weights[name], others[name]) for name in weights)
