import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from peft_sparse import SemiStructured, prune
from peft_sparse.model.environment import environment, peak_memory
from peft_sparse.pruning.report import PruningReport, WeightReport, _by_depth

from conftest import tiny


def report_of(*weights):
    return PruningReport("wanda", "0.5", "row", 0.5, 1.0, 1, tuple(WeightReport(*weight) for weight in weights))


def test_the_report_says_what_was_done(llama):
    plain = prune(llama, "2:4").to_dict()
    assert (plain["criterion"], plain["pattern"], plain["group"], plain["sparsity"]) == ("magnitude", "2:4", None, 0.5)
    first = {"name": "model.layers.0.self_attn.q_proj", "shape": (16, 16), "sparsity": 0.5}
    assert plain["weights"][0] == first | {"error": None, "error_selected": None}
    assert plain["error"] is None
    assert 0 < plain["seconds"] < 60
    assert plain["peak_memory"] > 1e6


def test_a_report_is_ready_for_json(llama, tokens):
    report = prune(llama, 0.5, criterion="wanda", calibration=tokens)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["error"] == report.error
    assert [weight["error"] for weight in plain["weights"]] == [weight.error for weight in report.weights]


def test_a_report_is_printed(llama, tokens):
    other = tiny("llama")
    assert "pruned 21 weights to sparsity 0.5000 (magnitude, 2:4) in " in str(prune(llama, SemiStructured(2, 4)))
    report = prune(other, 0.5, criterion="wanda", calibration=tokens)
    assert "(wanda, 0.5 per row) in " in str(report)
    assert f"s, mean relative output error {report.error:.4f}" in str(report)
    assert str(report).endswith(f"{report.error:.4f}")


def test_a_report_prints_what_was_asked_for_beside_the_criterion(llama, tokens):
    options = {"allocation": "owl", "refinement": "swap", "update": True}
    report = prune(llama, 0.5, criterion="wanda", calibration=tokens, **options)
    assert "(wanda, 0.5 per row, allocation owl, swap, updated) in " in str(report)
    assert str(report).endswith(f"{report.error:.4f} ({report.error_selected:.4f} as selected)")
    plain = json.loads(json.dumps(report.to_dict()))
    assert {name: plain[name] for name in options} == options
    assert plain["error_selected"] == report.error_selected > report.error


def test_the_mean_error_leaves_out_what_was_not_measured():
    assert report_of(("a", (1, 1), 0.5, 0.1), ("b", (1, 1), 0.5, None), ("c", (1, 1), 0.5, 0.3)).error == 0.2
    assert report_of(("a", (1, 1), 0.5)).error is None


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_picture_is_drawn(calibrated, tokens, tmp_path):
    pytest.importorskip("matplotlib")
    for family in ("llama", "qwen2_moe"):
        options = {"criterion": "wanda", "calibration": torch.randint(0, 61, (24, 12))} if calibrated else {}
        path = tmp_path / f"{family}.png"
        prune(tiny(family), 0.5, **options).plot(path)
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


def test_lines_are_drawn_at_the_depth_of_their_blocks():
    report = report_of(
        ("model.layers.1.up", (1, 1), 0.1, None),
        ("model.layers.10.up", (1, 1), 0.3, 0.5),
        ("model.layers.10.experts.down.0", (1, 1), 0.2, 0.1),
        ("model.layers.10.experts.down.1", (1, 1), 0.4, 0.3),
        ("lm_head", (1, 1), 0.7, 0.7),
    )
    sparsity = _by_depth(report.weights, "sparsity")
    assert sparsity == {"up": {1: 0.1, 10: 0.3}, "experts.down": {10: pytest.approx(0.3)}, "lm_head": {0: 0.7}}
    errors = _by_depth(report.weights, "error")
    assert math.isnan(errors["up"][1])
    assert errors["up"][10] == 0.5
    assert errors["experts.down"] == {10: pytest.approx(0.2)}


def test_encoder_and_decoder_are_drawn_apart():
    names = [weight.name for weight in prune(tiny("t5"), 0.5).weights]
    kinds = _by_depth(report_of(*((name, (1, 1), 0.5) for name in names)).weights, "sparsity")
    assert all(list(curve) == [0, 1] for curve in kinds.values())
    assert "encoder.block layer.0.SelfAttention.q" in kinds
    assert len(kinds) == len(names) // 2


def test_a_picture_without_matplotlib_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report_of(("a", (1, 1), 0.5)).plot("picture.png")


def test_the_environment_is_told():
    told = environment()
    assert told["versions"].keys() == {"peft_sparse", "torch", "transformers", "peft", "accelerate"}
    assert told["threads"] == torch.get_num_threads()
    assert told["command"].startswith("python ")
    assert told["hardware"]
    json.dumps(told)


def test_peak_memory_is_in_bytes():
    assert 5e7 < peak_memory() < 1e12


def test_peak_memory_is_told_on_windows(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr("psutil.Process.memory_info", lambda process: SimpleNamespace(peak_wset=10**9))
    assert peak_memory() == 10**9
