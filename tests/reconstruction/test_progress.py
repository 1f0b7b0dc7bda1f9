"""What a killed run leaves on disk, and what it may be used for."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from peft_sparse.calibration.inputs import fingerprint_of_inputs
from peft_sparse.reconstruction import progress
from peft_sparse.reconstruction.progress import Progress, fingerprint_of_model


OWN = {"model": "a", "data": "b", "arguments": "c"}
TENSORS = {
    "block.weight": torch.arange(6.0).view(2, 3).T,
    "block.bias": torch.randn(3).bfloat16(),
    "block.norm": nn.Parameter(torch.ones(3)),
}
NOTES = {"reports": [{"error": 0.25, "reverted": False}], "counts": {"block": (3, 6)}}


def finished(folder, number=4):
    kept = Progress(folder, OWN)
    kept.save(number, TENSORS, NOTES)
    return kept


def test_a_finished_region_comes_back_as_it_was(tmp_path):
    finished(tmp_path / "deep" / "state")
    tensors, notes = Progress(tmp_path / "deep" / "state", OWN).load(4)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert notes["reports"] == NOTES["reports"]
    assert notes["counts"] == {"block": [3, 6]}


def test_a_region_that_is_not_finished_is_not_there(tmp_path):
    kept = finished(tmp_path)
    assert kept.load(3) is None
    assert kept.load(5) is None


def test_no_folder_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert finished(None).load(4) is None
    assert not list(tmp_path.iterdir())


def test_the_last_of_two_results_counts(tmp_path):
    kept = finished(tmp_path)
    kept.save(4, {"block.weight": torch.zeros(2)}, {"reports": []})
    tensors, notes = kept.load(4)
    assert list(tensors) == ["block.weight"]
    assert notes == {"reports": []}


# -- killed at any moment -------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As SIGKILL, it is caught by nobody."""


@pytest.mark.parametrize("survived", range(4))
def test_a_region_is_finished_once_all_of_it_is_on_disk(tmp_path, monkeypatch, survived):
    """The process dies at each of the calls that write, in turn."""
    kept, left = Progress(tmp_path, OWN), [survived]

    def until_killed(write):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return write(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", until_killed(Path.write_bytes))
        patched.setattr(progress, "save_file", until_killed(progress.save_file))
        patched.setattr(os, "replace", until_killed(os.replace))
        with pytest.raises(Killed):
            kept.save(4, TENSORS, NOTES)
    resumed = Progress(tmp_path, OWN)
    assert resumed.load(4) is None
    resumed.save(4, TENSORS, NOTES)
    assert torch.equal(resumed.load(4)[0]["block.weight"], TENSORS["block.weight"])


def test_a_fingerprint_that_was_not_finished_is_written_anew(tmp_path, monkeypatch):
    def die(*args):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", die)
        with pytest.raises(Killed):
            Progress(tmp_path, OWN)
    Progress(tmp_path, OWN | {"data": "other"})
    with pytest.raises(ValueError, match="another data"):
        Progress(tmp_path, OWN)


def test_processes_that_write_the_same_do_not_trip_over_each_other(tmp_path, monkeypatch):
    """Several processes share the folder: each time one has written a file, another one does all of it."""
    replace = os.replace

    def after_another(*args):
        monkeypatch.setattr(os, "replace", replace)
        finished(tmp_path)
        monkeypatch.setattr(os, "replace", after_another)
        replace(*args)

    monkeypatch.setattr(os, "replace", after_another)
    finished(tmp_path)
    monkeypatch.setattr(os, "replace", replace)
    assert Progress(tmp_path, OWN).load(4)[1]["reports"] == NOTES["reports"]


# -- whose state it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model": "x"}, "another model. Resume"),
        ({"data": "x"}, "another data. Resume"),
        ({"arguments": "x", "model": "y"}, "another model, arguments. Resume"),
        ({"dense": "x"}, "another dense. Resume"),
    ],
)
def test_the_state_of_another_run_is_refused_by_name(tmp_path, changed, named):
    finished(tmp_path)
    with pytest.raises(
        ValueError, match=f"{tmp_path.name}' holds the state of a run with {named}.* or delete the folder"
    ):
        Progress(tmp_path, OWN | changed)
    assert json.loads((tmp_path / "fingerprint.json").read_text()) == OWN
    assert Progress(tmp_path, OWN).load(4) is not None


class Small(nn.Module):
    def __init__(self, columns=4):
        super().__init__()
        self.one, self.other = nn.Linear(columns, 3), nn.Linear(3, 2, bias=False)


def renamed(model):
    model.another = model.other
    del model.other


def replaced(model):
    model.one = nn.Linear(4, 3)


def one_weight(model):
    model.one.weight[1, 2] += 1e-6


def one_sign(model):
    model.other.weight[0, 0] *= -1


def one_zero(model):
    model.other.weight[0, 0] = 0


@pytest.mark.parametrize("change", [renamed, replaced, one_weight, one_sign, one_zero, lambda model: model.bfloat16()])
def test_the_fingerprint_of_a_model_tells_any_change(change):
    model = Small()
    other = copy.deepcopy(model)
    assert fingerprint_of_model(other) == fingerprint_of_model(model)
    with torch.no_grad():
        change(other)
    assert fingerprint_of_model(other) != fingerprint_of_model(model)


def test_the_fingerprint_of_a_model_does_not_depend_on_the_number_of_threads():
    """Resumed on another machine, sums of floats come out in another order."""
    model, threads = nn.ParameterList([torch.randn(5_000_000) * torch.rand(5_000_000).exp()]), torch.get_num_threads()
    found = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(fingerprint_of_model(model))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_parameters_that_are_not_loaded_count_by_shape():
    with torch.device("meta"):
        one, same, wider = Small(), Small(), Small(5)
    assert fingerprint_of_model(one) == fingerprint_of_model(same) != fingerprint_of_model(wider)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.uint8])
def test_parameters_of_any_type_have_a_fingerprint(dtype):
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(3, 2).to(dtype), requires_grad=False)
    before = fingerprint_of_model(model)
    model.weight[1, 1] = 2
    assert fingerprint_of_model(model) != before
    model.weight[1, 1] = 1
    assert fingerprint_of_model(model) == before


TOKENS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize(
    "other",
    [
        [{"input_ids": TOKENS + 1}],
        [{"input_ids": TOKENS.view(3, 4)}],
        [{"input_ids": TOKENS.int()}],
        [{"decoder_input_ids": TOKENS}],
        [{"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}],
        [{"input_ids": TOKENS[:1]}, {"input_ids": TOKENS[1:]}],
        [{"input_ids": TOKENS, "use_cache": False}],
    ],
)
def test_the_fingerprint_of_inputs_tells_any_change(other):
    assert fingerprint_of_inputs([{"input_ids": TOKENS}]) != fingerprint_of_inputs(other)


def test_the_fingerprint_of_inputs_is_that_of_their_values():
    batch = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "use_cache": False}
    strided = {name: value.T.contiguous().T if torch.is_tensor(value) else value for name, value in batch.items()}
    assert fingerprint_of_inputs([batch]) == fingerprint_of_inputs([dict(reversed(strided.items()))])


def test_inputs_in_half_precision_have_a_fingerprint():
    pixels = torch.randn(2, 3).bfloat16()
    assert fingerprint_of_inputs([{"pixel_values": pixels}]) == fingerprint_of_inputs(
        [{"pixel_values": pixels.clone()}]
    )
    assert fingerprint_of_inputs([{"pixel_values": pixels}]) != fingerprint_of_inputs([{"pixel_values": -pixels}])
