"""Runs that are killed and resumed, runs that must not be resumed, and runs that processes share."""

import functools
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from transformers import get_linear_schedule_with_warmup

from peft_sparse import MaskLoRAConfig
from peft_sparse.model.processes import OtherProcessError

from checks import assert_same_weights, named
from conftest import tiny
from rebuilding import Told, batches_of, lively, rebuild
from trainers import importing, in_two_processes


LORA = MaskLoRAConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"])


# Family, options, and where the run is killed: after so many regions and one more, or at a step of the one after them.
KILLED = {
    "between two regions": ("llama", {"criterion": "random"}, (2, None)),
    "within a region": ("llama", {"mode": "SD", "gradient_accumulation_steps": 2}, (3, 2)),
    "within the first region": ("llama", {}, (0, 1)),
    "with adapters": ("llama", {"tuner": LORA, "mode": "DD"}, (2, 1)),
    "with allocation, refinement and update": (
        "llama",
        {"criterion": "wanda", "allocation": "owl", "refinement": "dsnot", "update": True},
        (3, 2),
    ),
    "single matrices": ("llama", {"region": "matrix", "criterion": "wanda"}, (2, None)),
    "in the second stack": ("t5", {"region": "block", "mode": "SD"}, (2, 3)),
}


def calibration_of(family):
    torch.manual_seed(0)
    return batches_of(family)


def run_until_killed(folder, scenario):
    """Run a scenario of `KILLED` in this process, which does not survive it."""
    family, options, (last, step) = KILLED[scenario]

    def after_region(report):
        if step is None and len(told.regions) > last:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_step(taken):
        if len(told.regions) == last and taken.number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    told = Told(after_step, after_region)
    rebuild(lively(family), calibration_of(family), state_dir=folder, observer=told, **options)


def run_all_until_killed(folder):
    """Run every scenario in a process of its own; nothing is imported twice."""
    for scenario in KILLED:
        child = os.fork()
        if child == 0:
            run_until_killed(Path(folder) / scenario, scenario)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"{scenario!r} was not killed"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folders that killed runs left, with strings hashed otherwise than here."""
    folder = tmp_path_factory.mktemp("killed")
    subprocess.run(
        [sys.executable, "-c", f"{importing(__file__)}; tests.run_all_until_killed({str(folder)!r})"],
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    return folder


@pytest.mark.parametrize("scenario", KILLED)
@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was_and_ends_as_an_uninterrupted_one(killed, scenario):
    family, options, (last, step) = KILLED[scenario]
    whole, model, told = lively(family), lively(family), Told()
    expected = rebuild(whole, calibration_of(family), **options)
    done = last if step is not None else last + 1
    matrices = options.get("region") == "matrix"
    assert len(list((killed / scenario).glob("*.safetensors"))) == (1 if matrices else done)
    report = rebuild(model, calibration_of(family), state_dir=killed / scenario, observer=told, **options)
    assert_same_weights(model, whole)
    names = [region.name for region in expected.regions]
    assert list(dict.fromkeys(step.region for step in told.steps)) == ([] if matrices else names[done:])
    assert [replace(region, seconds=0) for region in report.regions] == [
        replace(region, seconds=0) for region in expected.regions
    ]
    # Regions that an earlier run finished are reported too, so that a log is complete.
    assert tuple(told.regions) == report.regions
    assert report.pruning.weights == expected.pruning.weights

    again = lively(family)
    rebuild(again, calibration_of(family), state_dir=killed / scenario, observer=Told(on_step=pytest.fail), **options)
    assert_same_weights(again, whole)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    rebuild(lively("llama"), calibration_of("llama"), state_dir=folder)
    return folder


def other_tokens():
    return [{"input_ids": (batch["input_ids"] + 1) % 61} for batch in calibration_of("llama")]


def warmed_up(optimizer, steps):
    return get_linear_schedule_with_warmup(optimizer, steps, steps)


@pytest.mark.parametrize(
    "changed",
    [
        {"pattern": 0.6},
        {"pattern": {"q_proj": 0.5}},
        {"criterion": "wanda"},
        {"group": "row"},
        {"target_modules": ["q_proj"]},
        {"exclude_modules": ["q_proj"]},
        {"allocation": "erk"},
        {"refinement": "swap"},
        {"update": True},
        {"region": "block"},
        {"mode": "DD"},
        {"loss": "cosine"},
        {"tuner": MaskLoRAConfig(r=2)},
        {"learning_rate": 1e-3},
        {"epochs": 2},
        {"max_steps": 5},
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 1.0},
        {"optimizer": functools.partial(torch.optim.AdamW, lr=1e-2)},
        {"scheduler": warmed_up},
        {"autocast": torch.bfloat16},
        {"holdout": 0.3},
        {"seed": 1},
    ],
    ids=named,
)
def test_a_run_with_other_arguments_is_not_resumed(state, changed):
    with pytest.raises(ValueError, match="state of a run with another arguments. Resume with the same"):
        rebuild(lively("llama"), calibration_of("llama"), state_dir=state, **changed)


@pytest.mark.parametrize(
    "changed",
    [
        ({"optimizer": functools.partial(torch.optim.SGD, lr=0.1)}, {"optimizer": torch.optim.SGD}),
        (
            {"optimizer": functools.partial(torch.optim.SGD, lr=0.1)},
            {"optimizer": functools.partial(torch.optim.SGD, lr=1)},
        ),
        ({"tuner": LORA}, {"tuner": MaskLoRAConfig(r=2, target_modules=["q_proj"])}),
    ],
)
def test_choices_are_told_apart_by_what_is_in_them(tmp_path, changed):
    first, second = changed
    rebuild(lively("llama"), calibration_of("llama"), state_dir=tmp_path, max_steps=0, **first)
    rebuild(lively("llama"), calibration_of("llama"), state_dir=tmp_path, max_steps=0, **first)
    with pytest.raises(ValueError, match="another arguments"):
        rebuild(lively("llama"), calibration_of("llama"), state_dir=tmp_path, max_steps=0, **second)


def test_a_run_on_other_data_or_another_model_is_not_resumed(state, tmp_path):
    with pytest.raises(ValueError, match="another data. Resume"):
        rebuild(lively("llama"), other_tokens(), state_dir=state)
    with pytest.raises(ValueError, match="another data. Resume"):
        rebuild(lively("llama"), calibration_of("llama")[:2], state_dir=state)
    with pytest.raises(ValueError, match="another model. Resume"):
        rebuild(tiny("llama"), calibration_of("llama"), state_dir=state)
    with pytest.raises(ValueError, match="another model, data, arguments. Resume"):
        rebuild(tiny("opt"), other_tokens(), state_dir=state)
    options = {"state_dir": tmp_path, "pattern": None, "max_steps": 0}
    rebuild(lively("llama"), calibration_of("llama"), dense=tiny("llama"), **options)
    other = tiny("llama")
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    with pytest.raises(ValueError, match="another dense model. Resume"):
        rebuild(lively("llama"), calibration_of("llama"), dense=other, **options)


# -- several processes ------------------------------------------------------------------------------------------------


SHARED = {
    "llama": {"tuner": LORA, "mode": "DD", "criterion": "wanda", "allocation": "owl"},
    # The regions of the encoder are left out, and those of the decoder keep their numbers.
    "bart": {"mode": "DD", "region": "block", "target_modules": r".*decoder\.layers.*(fc1|fc2)"},
    # Every block is fitted whole, so every second number is not used.
    "t5": {"mode": "DD", "target_modules": r".*decoder\..*"},
}


def run_as_one_of_many(folder, family):
    """Reconstruct as one process of those that torchrun started, and save what came of it."""
    state, model = PartialState(cpu=True), lively(family)
    told = Told()
    report = rebuild(model, calibration_of(family), state_dir=Path(folder) / "state", observer=told, **SHARED[family])
    said = {"weights": model.state_dict(), "regions": report.regions, "pruning": report.pruning.weights}
    said["told"] = [region.name for region in told.regions]
    torch.save(said, Path(folder) / f"{state.process_index}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("family", SHARED)
def test_processes_share_out_the_regions_of_mode_dd(family, tmp_path):
    in_two_processes(tmp_path, __file__, f"run_as_one_of_many({str(tmp_path)!r}, {family!r})")
    model = lively(family)
    report = rebuild(model, calibration_of(family), **SHARED[family])
    for process in range(2):
        found = torch.load(tmp_path / f"{process}.pt", weights_only=False)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-5, atol=1e-6)
            assert torch.equal(found["weights"][name] == 0, value == 0)
        names = [region.name for region in report.regions]
        assert [region.name for region in found["regions"]] == names
        assert sorted(found["told"]) == sorted(names)
        errors = [(region.error_pruned, region.error) for region in found["regions"]]
        assert sum(errors, ()) == pytest.approx(sum(((r.error_pruned, r.error) for r in report.regions), ()), rel=1e-4)
        assert [weight.name for weight in found["pruning"]] == [weight.name for weight in report.pruning.weights]


def stop_all():
    """Whatever one process has of its own is told in all, and no process waits for another one."""
    rank = PartialState(cpu=True).process_index
    calibration, other = calibration_of("llama"), other_tokens()
    with pytest.raises(ValueError, match="by 6 sequences .* hash .* in process 0 and .* Give all processes the same"):
        rebuild(lively("llama"), [calibration, other][rank], mode="DD")
    with pytest.raises(ValueError, match="submodule SS .* in process 0 and .* submodule DD .* in process 1"):
        rebuild(lively("llama"), calibration, mode=["SS", "DD"][rank])
    with pytest.raises(ValueError, match="Expected the same call in all 2 processes"):
        rebuild([lively, tiny][rank]("llama"), calibration)
    error, words = [(OtherProcessError, "process 1 stopped with ValueError: `mode` must"), (ValueError, "`mode`")][
        rank
    ]
    with pytest.raises(error, match=words):
        rebuild(lively("llama"), calibration, mode=["DD", "none"][rank])
    for mode in ("SS", "DD"):
        fail_in_process_one(rank, calibration, mode)
    # After all this, the processes are in step.
    rebuild(lively("llama"), calibration, mode="DD", max_steps=1)


def fail_in_process_one(rank, calibration, mode):
    def fail(step):
        if rank == 1 and step.region == "model.layers.0 (mlp)":
            raise ArithmeticError("out of luck")

    model = lively("llama")
    error, words = [(OtherProcessError, "process 1 stopped with Arith.*: out of luck"), (ArithmeticError, "out of")][
        rank
    ]
    with pytest.raises(error, match=words):
        rebuild(model, calibration, mode=mode, observer=Told(on_step=fail))
    # It stops at once, and not at the end of the run.
    assert torch.equal(model.model.layers[2].mlp.up_proj.weight, lively("llama").model.layers[2].mlp.up_proj.weight)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
def test_an_error_or_a_difference_in_one_process_stops_all(tmp_path):
    in_two_processes(tmp_path, __file__, "stop_all()")
