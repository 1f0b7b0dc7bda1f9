"""The arguments of training: on the command line, as JSON, and as values of the pruning folder."""

import json

import pytest
from transformers import HfArgumentParser, TrainingArguments

from peft_sparse import SparseTrainer, SparseTrainingArguments
from peft_sparse.pruning.criteria import Wanda
from peft_sparse.pruning.least_squares import LeastSquares
from peft_sparse.pruning.owl import OWL
from peft_sparse.pruning.sparsegpt import SparseGPT
from peft_sparse.pruning.swap import Swap

from conftest import Samples, tiny
from trainers import arguments


OPTIONS = {
    "criterion": ("sparsegpt", {"damping": 0.1}, SparseGPT(damping=0.1)),
    "allocation": ("owl", {"outlier_factor": 4}, OWL(outlier_factor=4)),
    "refinement": ("swap", {"max_swaps": 7}, Swap(max_swaps=7)),
    "update": (True, {"damping": 0.2}, LeastSquares(damping=0.2)),
}
# Every other field of ours, with a value that is not its default.
OTHERS = {
    "sparsity": 0.5,
    "pattern": "2:4",
    "group": "row",
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": ["lm_head"],
    "calibration_samples": 4,
    "recalibrate_norms": True,
    "pruning_schedule": "cycles",
    "pruning_rounds": 2,
    "pruning_interval": 3,
    "retraining_schedule": "allr",
    "original_steps": 100,
    # A retraining schedule and a search do not go together.
    "find_learning_rate": False,
    "distillation": "logits",
    "distillation_weight": 0.25,
    "distillation_temperature": 2.0,
    "recovery": "retrain",
    "reconstruction_region": "block",
    "reconstruction_mode": "DD",
    "reconstruction_loss": "cosine",
    "reconstruction_holdout": 0.2,
    "reconstruction_learning_rate": 1e-4,
    "reconstruction_epochs": 2.5,
    "reconstruction_batch_size": 3,
    "activations": "cpu",
    "save_on_sigterm": True,
}


def parsed(**values):
    words = ["--output_dir", "unused", "--use_cpu"]
    for name, value in values.items():
        spelled = json.dumps(value) if isinstance(value, dict) else value
        words += [f"--{name}", *map(str, spelled if isinstance(spelled, list) else [spelled])]
    (args,) = HfArgumentParser(SparseTrainingArguments).parse_args_into_dataclasses(words)
    return args


def test_the_command_line_sets_every_field():
    options = {f"{name}_options": options for name, (_, options, _) in OPTIONS.items()}
    values = OTHERS | {name: choice for name, (choice, _, _) in OPTIONS.items()} | options
    inherited = {*TrainingArguments.__dataclass_fields__}
    assert values.keys() == SparseTrainingArguments.__dataclass_fields__.keys() - inherited
    # A group and an n:m pattern do not go together.
    for left_out in ("group", "pattern"):
        given = {name: value for name, value in values.items() if name != left_out}
        args = parsed(**given)
        assert {name: getattr(args, name) for name in given} == given
    assert json.loads(args.to_json_string())["criterion_options"] == {"damping": 0.1}


def test_the_docstring_lists_every_field():
    own = SparseTrainingArguments.__dataclass_fields__.keys() - TrainingArguments.__dataclass_fields__.keys()
    assert [name for name in own if f"\n        {name}: " not in SparseTrainingArguments.__doc__] == []


@pytest.mark.parametrize("name", OPTIONS)
def test_a_name_and_its_options_are_a_value(name):
    choice, options, value = OPTIONS[name]
    assert parsed(**{name: choice, f"{name}_options": options}).pruning_options()[name] == value
    args = arguments("unused", **{name: choice, f"{name}_options": options})
    assert args.pruning_options()[name] == value
    assert arguments("unused", **{name: choice}).pruning_options()[name] == type(value)()


def test_without_choices_the_defaults_of_prune_are_passed():
    assert arguments("unused", criterion="wanda").pruning_options() == {
        "pattern": None,
        "criterion": Wanda(),
        "group": None,
        "allocation": None,
        "refinement": None,
        "update": False,
        "target_modules": None,
        "exclude_modules": None,
    }


def test_the_options_reach_the_pruning(tmp_path):
    options = {"criterion": "sparsegpt", "criterion_options": {"block_size": 8}, "calibration_samples": 4}
    trainer = SparseTrainer(tiny("llama"), arguments(tmp_path, sparsity=0.5, **options), train_dataset=Samples())
    trainer.train()
    assert trainer.pruning_report.criterion == "sparsegpt(block_size=8)"
