"""Two processes on CPUs, started with the configurations that the examples ship: the same training as in one."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_sparse import sparsity

import distributed
from trainers import launch


STRATEGIES = ["ddp", "fsdp2", "zero2", "zero3"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What every mode comes to in one process."""
    folder = tmp_path_factory.mktemp("alone")
    return {mode: distributed.train(mode, folder / mode) for mode in distributed.MODES}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_as_one(strategy, tmp_path, alone):
    run = launch(strategy, tmp_path)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    for mode in distributed.MODES:
        found = [torch.load(tmp_path / f"{mode}.{rank}.pt", weights_only=False) for rank in range(2)]
        for process in found:
            for name, expected in alone[mode].items():
                compare(mode, process[name], expected)
        if mode != "callback":
            merged = AutoModelForCausalLM.from_pretrained(tmp_path / mode / "merged")
            assert sparsity(merged) == 0.5
            for name, weight in merged.state_dict().items():
                assert torch.equal(weight, found[0]["whole"]["weights"][name]), name


def test_a_process_that_fails_stops_all_with_its_own_words(tmp_path):
    run = launch("ddp", tmp_path, "fail")
    assert run.returncode != 0
    assert "RuntimeError: the words of process 1" in run.stderr
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize(("strategy", "held"), [("ddp", 21), ("zero3", 0)])
def test_no_gathered_weight_waits_for_backward(strategy, held, tmp_path):
    run = launch(strategy, tmp_path, "held")
    assert run.returncode == 0, run.stderr[-6000:]
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [held, held]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_all_processes_save_and_stop_where_one_is_terminated(strategy, tmp_path):
    run = launch(strategy, tmp_path, "terminate")
    assert run.returncode == 0, run.stderr[-6000:]
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [2, 2]
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()
    assert not (tmp_path / "checkpoint-4").exists()


def compare(mode, found, expected):
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["norms"] == pytest.approx(expected["norms"], rel=5e-3)
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    assert found["sparsity"] == expected["sparsity"] == 0.5
    assert found["fingerprints"] == expected["fingerprints"]
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        assert torch.equal(found["weights"][name] == 0, weight == 0), name
        says = partial("{}, {}: {}".format, mode, name)
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=1e-4, msg=says)
