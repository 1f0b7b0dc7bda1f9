"""PEFT's method comparison and its table of capabilities read our configurations and classes as PEFT's own."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig


COMPARISON = Path(__file__).resolve().parents[2] / "benchmarks" / "method_comparison"
EXPERIMENTS = COMPARISON / "MetaMathQA" / "experiments"
Q_AND_V = {"q_proj", "v_proj"}
# What PEFT's experiments of the same names train with.
EXPECTED = {
    "mask_lora/llama-3.2-3B-rank32": (MaskLoRAConfig, 32, 64, Q_AND_V, {}),
    "mask_lora/llama-3.2-3B-rank16-all-linear-lr3e-4": (
        MaskLoRAConfig, 16, 32, "all-linear", {"lr": 3e-4, "weight_decay": 0.1},
    ),
    "scaled_lora/llama-3.2-3B-rank32-lr4.5e-3": (
        ScaledLoRAConfig, 32, 32, Q_AND_V, {"lr": 4.5e-3, "weight_decay": 0.0},
    ),
}  # fmt: skip

# It stands for PEFT's script: it takes the experiment by a relative path, reads the configuration, and imports a
# module that lies beside it.
FAKE = """
import json, os, sys
registered = "peft_sparse" in sys.modules
from utils import MARK
from peft import PeftConfig
method, name = sys.argv[1].split(os.path.sep)[1:]
config = PeftConfig.from_pretrained(sys.argv[1])
path = os.path.join(sys.argv[1], "training_params.json")
found = {
    "registered": registered, "mark": MARK, "main": __name__, "type": config.peft_type.value, "method": method,
    "name": name, "rest": sys.argv[2:], "parameters": json.load(open(path)) if os.path.exists(path) else {},
}
json.dump(found, open(os.path.join(os.path.dirname(__file__), "result.json"), "w"))
"""


def test_every_experiment_loads_as_our_class_with_the_values_of_its_name():
    found = {path.parent.relative_to(EXPERIMENTS).as_posix() for path in EXPERIMENTS.rglob("adapter_config.json")}
    assert found == set(EXPECTED)
    for name, (config_cls, r, lora_alpha, targets, optimizer) in EXPECTED.items():
        config = PeftConfig.from_pretrained(EXPERIMENTS / name)
        assert type(config) is config_cls
        assert (config.r, config.target_modules, config.task_type) == (r, targets, "CAUSAL_LM")
        assert config.lora_alpha == lora_alpha
        path = EXPERIMENTS / name / "training_params.json"
        parameters = json.loads(path.read_text()) if path.exists() else {}
        assert parameters == ({"optimizer_kwargs": optimizer} if optimizer else {})


@pytest.fixture
def checkout(tmp_path):
    suite = tmp_path / "peft" / "method_comparison" / "MetaMathQA"
    theirs = suite / "experiments" / "lora" / "rank4"
    theirs.mkdir(parents=True)
    (theirs / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    (suite / "run.py").write_text(FAKE)
    (suite / "utils.py").write_text("MARK = 'of the suite'\n")
    return tmp_path / "peft"


def started(*arguments):
    command = [sys.executable, str(COMPARISON / "run.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def result(checkout):
    return json.loads((checkout / "method_comparison" / "MetaMathQA" / "result.json").read_text())


@pytest.mark.slow
def test_pefts_script_runs_after_our_methods_are_registered(checkout):
    done = started(checkout, "experiments/mask_lora/llama-3.2-3B-rank32/", "-v", "--bucket_name", "b")
    assert done.returncode == 0, done.stderr
    assert result(checkout) == {
        "registered": True, "mark": "of the suite", "main": "__main__", "type": "MASK_LORA", "method": "mask_lora",
        "name": "llama-3.2-3B-rank32", "rest": ["-v", "--bucket_name", "b"], "parameters": {},
    }  # fmt: skip


@pytest.mark.slow
def test_another_base_model_is_written_into_a_copy_of_the_experiment(checkout, tmp_path):
    pruned = tmp_path / "llama-50" / "sparse"
    pruned.mkdir(parents=True)
    before = sorted(COMPARISON.rglob("*.json"))
    experiment = "experiments/scaled_lora/llama-3.2-3B-rank32-lr4.5e-3"
    assert started("--model-id", pruned, checkout, experiment).returncode == 0
    found = result(checkout)
    assert found["type"] == "SCALED_LORA"
    assert found["name"] == "llama-3.2-3B-rank32-lr4.5e-3-on-llama-50-sparse"
    kept = json.loads((COMPARISON / "MetaMathQA" / experiment / "training_params.json").read_text())
    assert found["parameters"] == kept | {"model_id": str(pruned)}
    assert sorted(COMPARISON.rglob("*.json")) == before
    # PEFT's own methods run on the same model.
    assert started("--model-id", "org/pruned", checkout, "experiments/lora/rank4").returncode == 0
    found = result(checkout)
    assert (found["type"], found["name"]) == ("LORA", "rank4-on-org-pruned")
    assert found["parameters"] == {"model_id": "org/pruned"}


@pytest.mark.parametrize(
    ("suite", "experiment", "message"),
    [
        ("none", "experiments/lora/rank4", "holds no run.py. Expected a checkout of huggingface/peft"),
        ("MetaMathQA", "experiments/lora", "Expected experiments/METHOD/NAME"),
        ("MetaMathQA", "experiments/lora/rank5", "Expected experiments/METHOD/NAME"),
    ],
)
def test_wrong_paths_are_refused(checkout, suite, experiment, message, capsys):
    spec = importlib.util.spec_from_file_location("method_comparison_run", COMPARISON / "run.py")
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    with pytest.raises(SystemExit) as ended:
        runner.main(["--suite", suite, str(checkout), experiment])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# -- what PEFT's scripts/generate_method_capabilities.py reads of a method -------------------------------------------

PAPER = re.compile(r"https://(?:huggingface\.co/papers/|arxiv\.org/(?:abs|pdf)/)[^\s)\"'>]+")


@pytest.mark.parametrize("name", ["MASK_LORA", "SCALED_LORA"])
def test_pefts_table_of_capabilities_finds_what_the_tuners_can_do(name):
    peft_type = PeftType(name)
    config_cls, model_cls = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type], PEFT_TYPE_TO_TUNER_MAPPING[peft_type]
    assert issubclass(model_cls, BaseTuner)
    module = sys.modules[model_cls.tuner_layer_cls.__module__]
    own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    layers = [c for c in own if issubclass(c, BaseTunerLayer)]
    # One address of one paper in each docstring, or it counts as ambiguous.
    for documented in (config_cls, model_cls):
        assert set(PAPER.findall(documented.__doc__)) == {"https://arxiv.org/abs/2312.15230"}
    # Quantisation backends: PEFT reads the source of these modules for the function that resolves them.
    assert "resolve_quantization_backend" in inspect.getsource(module)
    # Batches of several adapters.
    assert hasattr(model_cls, "_enable_peft_forward_hooks")
    assert all(hasattr(layer, "_mixed_batch_forward") for layer in layers)
    assert all(layer.merge is not BaseTunerLayer.merge for layer in layers)
    assert peft_type in PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    assert peft_type in CONFIG_KEYS_TO_CHECK
    # A first statement that raises means that the method is refused.
    source = textwrap.dedent(inspect.getsource(model_cls.add_weighted_adapter))
    _docstring, first, *_ = ast.parse(source).body[0].body
    assert not isinstance(first, ast.Raise)
    fields = {field.name for field in dataclasses.fields(config_cls)}
    options = {"target_parameters", "modules_to_save", "trainable_token_indices", "rank_pattern", "alpha_pattern"}
    assert fields >= options | {"use_rslora"}
