"""Runs that are killed or interrupted at random moments, and resumed until they end, end as if nothing had been."""

import functools
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from peft_sparse import MaskLoRAConfig, SparseTrainer
from peft_sparse.reconstruction.progress import is_progress
from peft_sparse.training.checkpoints import last_complete_checkpoint

from conftest import Samples, tiny
from forking import ended, forked
from trainers import arguments, importing


SAVES = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": 3}
MODES = {
    "mask_lora": {"sparsity": 0.5, "criterion": "wanda", "calibration_samples": 4, **SAVES},
    "full": {"sparsity": 0.5, **SAVES},
    "cycles": {"sparsity": 0.75, "pruning_schedule": "cycles", "pruning_rounds": 2, **SAVES},
    "reconstruct": {"sparsity": 0.5, "recovery": "reconstruct", "calibration_samples": 4, "max_steps": 2,
                    "save_strategy": "steps"},
}  # fmt: skip
TARGETS = {"mask_lora": "all-linear", "cycles": ["q_proj", "down_proj"]}


def begun(mode, folder):
    """Whether there is something to resume from."""
    if mode == "reconstruct":
        return is_progress(folder / "reconstruction")
    try:
        return bool(last_complete_checkpoint(folder))
    except ValueError:
        return False


def run(mode, folder):
    """Train, from the last checkpoint if there is one, and keep the weights that come of it."""
    model = tiny("mistral")
    if mode in TARGETS:
        torch.manual_seed(0)
        model = get_peft_model(model, MaskLoRAConfig(r=2, target_modules=TARGETS[mode], task_type="CAUSAL_LM"))
    args = arguments(folder, disable_tqdm=True, **MODES[mode])
    trainer = SparseTrainer(model, args, train_dataset=Samples(16))
    trainer.train(resume_from_checkpoint=True if begun(mode, folder) else None)
    torch.save(trainer.model.state_dict(), folder / "unfinished.pt")
    os.replace(folder / "unfinished.pt", folder / "end.pt")


def killed(mode, folder, moments):
    """Run in one process after the other. Each but the last is killed."""
    for seconds in moments:
        child = forked(lambda: run(mode, folder))
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        ended(child)
    assert ended(forked(lambda: run(mode, folder))) == 0


def interrupted(mode, folder, moments):
    """Run again and again in one process. Each run but the last is interrupted, as by Ctrl-C."""

    def runs():
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        for seconds in moments:
            try:
                signal.setitimer(signal.ITIMER_REAL, seconds)
                run(mode, folder)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
        run(mode, folder)

    assert ended(forked(runs)) == 0


WAYS = {"killed": killed, "interrupted": interrupted}


@functools.cache
def uninterrupted(mode, folder):
    """Return what a whole run of a mode comes to, and how long it takes."""
    # Imports first, so that they are not timed, and happen in no child.
    run(mode, folder / "imports")
    started = time.perf_counter()
    assert ended(forked(functools.partial(run, mode, folder / "timed"))) == 0
    return torch.load(folder / "timed" / "end.pt"), time.perf_counter() - started


def check_endings(mode, way, seeds, folder_of_all, expected, seconds):
    """Bring a run to an end through one to three interruptions, once for each seed."""
    for seed in seeds:
        chance = random.Random(f"{mode} {way} {seed}")
        moments = [chance.uniform(0, 1.1 * seconds) for _ in range(chance.randint(1, 3))]
        # An interrupt within Python's or a library's own code may leave a lock held, or come out as another error. It
        # does not twice.
        for folder in (folder_of_all / str(seed), folder_of_all / f"{seed}-again"):
            folder.mkdir()
            try:
                WAYS[way](mode, folder, moments)
                found = torch.load(folder / "end.pt")
                break
            except (AssertionError, OSError) as error:
                if way == "killed" or folder.name.endswith("again"):
                    raise AssertionError(f"{mode}, {way}, seed {seed}, after {moments} s: no end") from error
        differing = [name for name, value in expected.items() if not torch.equal(found[name], value)]
        assert not differing, f"{mode}, {way}, seed {seed}, after {moments} s: {differing[0]}"


def check_all(modes, seeds, folder):
    """Check the ways of ending early that `modes` names for each mode. Runs in a process of its own."""
    for mode, ways in modes.items():
        (Path(folder) / mode).mkdir(parents=True)
        expected, seconds = uninterrupted(mode, Path(folder) / mode)
        for way in ways:
            (Path(folder) / mode / way).mkdir()
            check_endings(mode, way, seeds, Path(folder) / mode / way, expected, seconds)


def in_a_fresh_process(modes, seeds, folder):
    code = f"{importing(__file__)}\ntests.check_all({modes!r}, {seeds!r}, {str(folder)!r})"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        check=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_a_run_ends_anywhere_and_resumes(tmp_path):
    ways = itertools.cycle(WAYS)
    in_a_fresh_process({mode: [next(ways)] for mode in MODES}, range(1), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_run_ends_anywhere_and_resumes_fifty_times(tmp_path, mode):
    in_a_fresh_process({mode: list(WAYS)}, range(1, 51), tmp_path)
