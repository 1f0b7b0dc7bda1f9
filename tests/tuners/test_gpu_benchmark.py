"""benchmarks/gpu.py runs every task on a CPU at toy size, so that it works on the day a GPU is there."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the script in this process, and return the result that it wrote."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("common", "demo", "gpu_checks", "traffic", "tuners"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)

    def started(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--toy", "--output", str(tmp_path / "gpu.json"), *arguments])
        runpy.run_path(str(BENCHMARKS / "gpu.py"), run_name="__main__")
        return json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()

    return started


@pytest.mark.filterwarnings("ignore:The Hessian of")
@pytest.mark.slow
def test_every_task_runs_and_every_check_passes(run):
    result, table = run()
    rows = result["rows"]
    assert result["left_out"] == []
    assert all(row["passed"] for row in rows if "check" in row)
    assert {row["tuner"] for row in rows if "tuner" in row} >= {
        "LoRA (PEFT)",
        "MaskLoRA",
        "MaskLoRA, int8",
        "HiRA (PEFT)",
    }
    assert {row["pruning"] for row in rows if "pruning" in row} == {
        "wanda",
        "sparsegpt",
        "swaps",
        "update",
        "reconstruct",
    }
    assert result["environment"]["hardware"] in table
    if not torch.cuda.is_available():
        assert all(row["peak"] is None for row in rows if "peak" in row)
    # The operations of this package move fewer bytes than the formula as it is written.
    found = {(row["part"], row["variant"]): row["bytes_per_weight"] for row in rows if "bytes_per_weight" in row}
    for part in ("effective weight", "dA and dB from G"):
        assert found[part, "operations"] < 0.7 * found[part, "formula"]


def test_no_task_begins_when_the_minutes_are_over(run):
    result, table = run("--minutes", "0")
    assert result["rows"] == []
    assert len(result["left_out"]) > 10
    assert "Left out: correctness of the formulas" in table
