import itertools
import math
from functools import partial

import pytest
import torch
from transformers import Trainer, TrainingArguments

from peft_sparse import SparseTrainer, ZeroGuardCallback, prune
from peft_sparse.training.learning_rates import RETRAINING, norm_drop, retraining_schedule

from conftest import Samples, tiny
from trainers import arguments


# Warm-up to 0.8 in two steps, then down to 0.2: T = 8.
ETA = [0.0, 0.4, 0.8, 0.7, 0.6, 0.5, 0.3, 0.2]


def rates(method, steps, eta=ETA, **options):
    """What an optimizer is given at each step, and once after the last."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = retraining_schedule(method, optimizer, eta, steps, **options)
    found = []
    for _ in range(steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


# Five steps have no warm-up: N' = 5.
BY_HAND = {
    "ft": [0.2] * 6,
    "lrw": [0.7, 0.6, 0.5, 0.3, 0.2, 0.2],
    # eta at floor(8 j / 5) = 0, 1, 3, 4, 6, and the end; the peak is at 2.
    "slr": [0.8, 0.8, 0.7, 0.6, 0.3, 0.2],
    # 0.2 + 0.6 (1 + cos(36° j)) / 2
    "clr": [0.8, 0.742705, 0.592705, 0.407295, 0.257295, 0.2],
    "llr": [0.8, 0.64, 0.48, 0.32, 0.16, 0.0],
    # d2 = 5/8; d1 = 0.75 starts at 0.6.
    "allr": [0.6, 0.48, 0.36, 0.24, 0.12, 0.0],
}


def test_every_schedule_has_its_case():
    assert BY_HAND.keys() == RETRAINING.keys()


@pytest.mark.parametrize("method", BY_HAND)
def test_the_rates_are_those_computed_by_hand(method):
    options = {"norm_drop": 0.75} if method == "allr" else {}
    assert rates(method, 5, **options) == pytest.approx(BY_HAND[method], abs=1e-6)
    as_function = rates(method, 5, lambda t: ETA[t], original_steps=8, **options)
    assert as_function == rates(method, 5, **options)


@pytest.mark.parametrize(("method", "start"), [("slr", 0.8), ("clr", 0.8), ("llr", 0.8), ("allr", 0.64)])
def test_the_first_tenth_warms_up_along_a_cosine(method, start):
    options = {"norm_drop": 0.8} if method == "allr" else {}
    found = rates(method, 40, [0.8, *[0.2] * 79], **options)
    expected = [start * (1 - math.cos(math.pi * t / 4)) / 2 for t in range(4)]
    assert found[:5] == pytest.approx([*expected, start])
    assert found[5] < start or method == "slr"


@pytest.mark.parametrize(("drop", "start"), [(0.1, 0.4), (0.5, 0.4), (0.9, 0.72), (1.5, 0.8)])
def test_allr_starts_between_the_share_of_steps_and_the_peak(drop, start):
    assert rates("allr", 5, [0.8] * 10, norm_drop=drop)[0] == pytest.approx(start)


def test_the_norm_drop_is_the_papers():
    weight, pruned = torch.tensor([[3.0, 4.0], [0.0, 12.0]]), torch.tensor([[0.0, 4.0], [0.0, 12.0]])
    # ||W - W_p|| = 3, ||W|| = 13; one of three nonzero entries went.
    expected = 3 / 13 / math.sqrt(1 / 3)
    sizes = [(float(w.square().sum()), int(w.count_nonzero())) for w in (weight, pruned)]
    assert norm_drop(*sizes) == pytest.approx(expected)


def test_groups_keep_their_ratio_to_the_optimizers_rate():
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.05}]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    retraining_schedule("ft", optimizer, ETA, 5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.02])


arguments = partial(arguments, max_steps=5, logging_steps=1, learning_rate=0.1)


CYCLES = {"sparsity": 0.6, "pruning_schedule": "cycles", "pruning_rounds": 2}


def logged(trainer):
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def test_arguments_choose_the_schedule(tmp_path):
    args = arguments(tmp_path, retraining_schedule="lrw", original_steps=20, warmup_steps=4)
    trainer = SparseTrainer(tiny("llama"), args, train_dataset=Samples())
    trainer.train()
    # The end of linear decay from 0.1 at step 4 to 0 at step 20.
    assert logged(trainer) == pytest.approx([0.1 * j / 16 for j in (5, 4, 3, 2, 1)])


def test_each_cycle_has_the_schedule_anew(tmp_path):
    args = arguments(tmp_path, retraining_schedule="llr", original_steps=20, **CYCLES)
    trainer = SparseTrainer(tiny("llama"), args, train_dataset=Samples())
    trainer.train()
    # Two steps, and the three that are left.
    assert logged(trainer) == pytest.approx([0.1, 0.05, 0.1, 0.1 * 2 / 3, 0.1 / 3])


def test_allr_measures_the_pruning_of_this_run(tmp_path):
    model, pruned = tiny("llama"), tiny("llama")
    prune(pruned, 0.6)
    vectors = [vector_of(model), vector_of(pruned)]
    gone = float((vectors[1] == 0).float().mean())
    drop = float((vectors[0] - vectors[1]).norm() / vectors[0].norm()) / math.sqrt(gone)
    assert 0.25 < drop < 1
    args = arguments(tmp_path, sparsity=0.6, retraining_schedule="allr", original_steps=20)
    trainer = SparseTrainer(model, args, train_dataset=Samples())
    trainer.train()
    assert logged(trainer) == pytest.approx([0.1 * drop * (1 - j / 5) for j in range(5)], rel=1e-4)


def vector_of(model):
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "proj" in name])


def test_allr_measures_each_cycle(tmp_path):
    stages = [tiny("llama") for _ in range(3)]
    prune(stages[1], 1 - 0.4**0.5)
    prune(stages[2], 0.6)
    vectors = [vector_of(stage) for stage in stages]
    starts = []
    for before, after in itertools.pairwise(vectors):
        gone = 1 - float((after != 0).sum() / (before != 0).sum())
        starts.append(float((before - after).norm() / before.norm()) / math.sqrt(gone))
    assert 0.2 < starts[0] < 0.9 * starts[1] < 0.9
    # Steps so small that training changes no mask.
    args = arguments(tmp_path, retraining_schedule="allr", original_steps=20, learning_rate=1e-6, **CYCLES)
    trainer = SparseTrainer(stages[0], args, train_dataset=Samples())
    trainer.train()
    first, second = (start * 1e-6 for start in starts)
    assert logged(trainer) == pytest.approx([first, first / 2, second, second * 2 / 3, second / 3], rel=1e-3)


def test_the_schedule_serves_a_plain_trainer(tmp_path):
    model = tiny("llama")
    prune(model, 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = retraining_schedule("llr", optimizer, [0.1], 5)
    args = arguments(tmp_path, TrainingArguments)
    options = {"optimizers": (optimizer, schedule), "callbacks": [ZeroGuardCallback()]}
    trainer = Trainer(model, args, train_dataset=Samples(), **options)
    trainer.train()
    assert logged(trainer) == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02])
