"""Pruning by several processes: batches are shared out, statistics added up, and all end with the same zeros."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate import PartialState

from peft_sparse import prune, prune_structured
from peft_sparse.model import processes as group

from conftest import EXPERTS, inputs_of, tiny
from trainers import in_two_processes


def wide(family):
    """A model in float64, where no near tie depends on the order of a sum."""
    model = tiny(family).double()
    if family in EXPERTS:
        # Grouped kernels take no float64.
        model.set_experts_implementation("eager")
    return model


def data(family, sequences=7, padded=False):
    """Single sequences, more than processes and no multiple of them."""
    torch.manual_seed(3)
    batch = inputs_of(family, sequences)
    if family == "vit":
        return [{name: rows[i : i + 1].double() for name, rows in batch.items()} for i in range(sequences)]
    if padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][:3, -4:] = 0
    return [{name: rows[i : i + 1] for name, rows in batch.items()} for i in range(sequences)]


def pruned(family, pattern, batches, **options):
    model = wide(family)
    return model, prune(model, pattern, calibration=batches, **options)


# The batches of each process leave some experts out.
FEW_TOKENS = [{"input_ids": torch.tensor([pair])} for pair in ([30, 25], [31, 0], [57, 29], [4, 42])]
ONE_BATCH = [{"input_ids": torch.cat([batch["input_ids"] for batch in data("llama")])}]

RUNS = {
    "wanda": lambda: pruned("llama", 0.5, data("llama"), criterion="wanda"),
    "padded": lambda: pruned("llama", 0.5, data("llama", padded=True), criterion="ria"),
    "sparsegpt": lambda: pruned("llama", "2:4", data("llama"), criterion="sparsegpt"),
    "biases": lambda: pruned("opt", 0.5, data("opt"), criterion="wanda", refinement="dsnot"),
    "gblm": lambda: pruned("gpt2", 0.5, data("gpt2"), criterion="gblm"),
    "update": lambda: pruned("llama", 0.5, data("llama"), criterion="wanda", refinement="swap", update=True),
    "owl": lambda: pruned("llama", 0.5, data("llama"), criterion="wanda", allocation="owl"),
    "model": lambda: pruned("llama", 0.5, data("llama"), criterion="wanda", group="model"),
    "two sides": lambda: pruned("t5", 0.5, data("t5"), criterion="wanda"),
    "images": lambda: pruned("vit", 0.5, data("vit"), criterion="wanda"),
    "experts": lambda: pruned("mixtral", 0.5, FEW_TOKENS, criterion="wanda"),
    "fewer batches than processes": lambda: pruned("llama", 0.5, ONE_BATCH, criterion="sparsegpt"),
    "fewer, of gradients": lambda: pruned("llama", 0.5, data("llama", 1), criterion="gblm"),
}


def structured():
    model = wide("llama")
    return model, prune_structured(model, 0.3, calibration=data("llama"))


def errors_of(report):
    return [weight.error for weight in getattr(report, "weights", ()) if weight.error is not None]


def run_everything(folder):
    """Prune in every way as one process of those that torchrun started, and save what came of it."""
    rank = PartialState(cpu=True).process_index
    found = {}
    for name, run in (RUNS | {"structured": structured}).items():
        model, report = run()
        found[name] = model.state_dict(), errors_of(report)
    torch.save(found, Path(folder) / f"{rank}.pt")


def fail_in_the_second():
    """One process cannot run its share: its own error, and word of it in the other."""
    rank, model = PartialState(cpu=True).process_index, tiny("llama")
    if rank == 1:
        model.model.layers[1].mlp.register_forward_pre_hook(_out_of_luck)
    words = ["process 1 stopped with ArithmeticError: out of luck", "out of luck"][rank]
    with pytest.raises([group.OtherProcessError, ArithmeticError][rank], match=words):
        prune(model, 0.5, criterion="wanda", calibration=data("llama"))
    # It is met before any work.
    assert not (model.model.layers[0].mlp.up_proj.weight == 0).any()
    # An argument that is wrong in one process alone stops both, too.
    words = ["process 1 stopped with ValueError: `group` must be", "`group` must be"][rank]
    with pytest.raises([group.OtherProcessError, ValueError][rank], match=words):
        prune(tiny("llama"), 0.5, criterion="wanda", calibration=data("llama"), group=[None, "none"][rank])
    # Another call finds the processes in step again.
    prune(tiny("llama"), 0.5, criterion="wanda", calibration=data("llama"))


def _out_of_luck(*args):
    raise ArithmeticError("out of luck")


def disagree():
    rank = PartialState(cpu=True).process_index
    with pytest.raises(ValueError, match="by 3 sequences .* in process 0 and .* by 4 sequences .* in process 1"):
        prune(tiny("llama"), 0.5, criterion="wanda", calibration=data("llama", 3 + rank))
    other = [{name: value.roll(rank, 1) for name, value in batch.items()} for batch in data("llama", 4)]
    with pytest.raises(
        ValueError, match="by 4 sequences .* hash .* in process 0 and .* hash .* Give all processes the same"
    ):
        prune(tiny("llama"), 0.5, criterion="wanda", calibration=other)


@pytest.mark.slow
def test_two_processes_prune_what_one_does_and_hold_the_same_weights(tmp_path):
    in_two_processes(tmp_path, __file__, f"run_everything({str(tmp_path)!r})")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, run in (RUNS | {"structured": structured}).items():
        model, report = run()
        weights, errors = first[name]
        assert errors == second[name][1], name
        assert errors == pytest.approx(errors_of(report), rel=1e-4), name
        for key, value in model.state_dict().items():
            assert torch.equal(weights[key], second[name][0][key]), (name, key)
            assert torch.equal(weights[key] == 0, value == 0), (name, key)
            torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_error_in_one_process_stops_all_with_words_of_their_own(tmp_path):
    in_two_processes(tmp_path, __file__, "fail_in_the_second()")


@pytest.mark.slow
def test_processes_with_other_data_are_refused(tmp_path):
    in_two_processes(tmp_path, __file__, "disagree()")


# -- within one process ----------------------------------------------------------------------------------------------


def test_alone_a_process_has_everything_and_sends_nothing():
    assert group.place() == (0, 1)
    assert group.share_of(range(5)) == [0, 1, 2, 3, 4]
    assert group.exchange("word") == ["word"]
    sums = torch.ones(3)
    group.add_up([sums])
    assert sums.tolist() == [1, 1, 1]
    with group.working_together("anything"):
        pass


@pytest.mark.parametrize("items", [0, 1, 2, 7])
def test_every_item_is_the_share_of_one_process(items):
    shares = []
    for rank in range(3):
        with mock.patch.object(group, "place", return_value=(rank, 3)):
            shares.append(group.share_of(range(items)))
    assert sorted(sum(shares, [])) == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_small_tensors_are_sent_together_and_large_ones_alone():
    with mock.patch.object(group, "_BUCKET", 10):
        tensors = [torch.ones(4), torch.ones(5), torch.ones(2), torch.ones(2, 8), torch.ones(1).double()]
        assert [len(bucket) for bucket in group._buckets(tensors)] == [2, 1, 1, 1]
        assert sum(group._buckets(tensors), []) == tensors
