"""The report names every matrix of the blocks that was not pruned, and why."""

import json

import pytest
import torch
from torch import nn

from peft_sparse import prune

from conftest import tiny


class Block(nn.Module):
    """One of everything that may hold a matrix."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.fc, self.short = nn.Linear(8, 8), nn.Conv1d(8, 8, 4, groups=8)
        self.table, self.norm = nn.Embedding(5, 8), nn.LayerNorm(8)
        self.state, self.scale = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(1, 1, 8))
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))


def test_every_matrix_is_pruned_or_listed_with_its_reason():
    model = nn.ModuleDict({"layers": nn.ModuleList([Block()]), "head": nn.Linear(8, 5)})
    report = prune(model, 0.5, exclude_modules=["fc"])
    assert report.left_out == {
        "layers.0.attention.in_proj_weight": (
            "nn.MultiheadAttention.in_proj_weight, which holds projections that are not called as layers"
        ),
        "layers.0.fc": "excluded",
        "layers.0.short": "a layer of a kind that is not pruned: Conv1d",
        "layers.0.state": "no layer: a parameter of 2 or more dimensions of Block",
        "layers.0.gate": "a router",
    }
    assert {weight.name for weight in report.weights} == {
        "layers.0.attention.out_proj",
        *(f"layers.0.experts.{i}.0" for i in range(3)),
    }
    assert str(report).endswith("left out 5 matrices in the blocks (" + report_reasons(report) + ")")
    assert json.loads(json.dumps(report.to_dict()))["left_out"] == report.left_out


def report_reasons(report):
    return ", ".join(f"{reason}: 1" for reason in report.left_out.values())


def test_what_targets_and_patterns_leave_out_is_listed():
    left = prune(tiny("mixtral"), 0.5, target_modules=["q_proj", "down_proj"]).left_out
    reasons = {name.rpartition(".")[2]: reason for name, reason in left.items()}
    others = dict.fromkeys(["k_proj", "v_proj", "o_proj", "gate_up_proj"], "not in `target_modules`")
    assert reasons == others | {"gate": "a router"}
    left = prune(tiny("llama"), {"q_proj": 0.5}, exclude_modules=["k_proj"]).left_out
    reasons = {name.rpartition(".")[2]: reason for name, reason in left.items()}
    assert len(left) == 18
    assert reasons["up_proj"] == "no key of `pattern` matches it"
    assert reasons["k_proj"] == "excluded"


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_where_everything_is_pruned_nothing_is_said(name):
    report = prune(tiny(name), 0.5)
    assert report.left_out == {}
    assert "left out" not in str(report)
