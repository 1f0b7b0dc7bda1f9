"""`compress` runs a recipe from a dense model to a folder that plain `from_pretrained` loads, and says what it did."""

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from peft_sparse import (
    LeastSquares,
    ScaledLoRAConfig,
    Swap,
    compress,
    load_recipe,
    perplexity,
    prune,
    reconstruct,
    sparsity,
)
from peft_sparse.recipes import RECIPES, AdapterArguments, recipe

from checks import assert_same_weights, assert_same_zeros, zeros_of
from rebuilding import lively
from trainers import StopAt


# Small enough for a tiny model. The stages are those of the recipes.
SMALL = {
    "sparsity": 0.5,
    "calibration_samples": 8,
    "max_steps": 4,
    "logging_steps": 2,
    "r": 4,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "report_to": "none",
}


def tokens(count=16, seed=1, length=10):
    return torch.randint(0, 61, (count, length), generator=torch.Generator().manual_seed(seed))


def run(path, name="balanced", model=None, **options):
    return compress(
        model or lively("llama"),
        name,
        tokens(),
        evaluation=options.pop("evaluation", {"text": tokens(4, seed=2)}),
        output_dir=path,
        **{**SMALL, **options},
    )


STAGES = {
    "fast": ["dense", "pruned", "saved"],
    "balanced": ["dense", "reconstructed", "retrained", "saved"],
    "best": ["dense", "reconstructed", "retrained", "saved"],
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("pattern", ["0.6", "2:4"])
def test_every_recipe_ends_in_a_sparse_model_that_plain_transformers_loads(tmp_path, name, pattern):
    asked = {"sparsity": 0.6} if pattern == "0.6" else {"sparsity": None, "pattern": pattern}
    report = run(tmp_path, name, **asked)
    assert [stage.name for stage in report.stages] == STAGES[name]
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert sparsity(saved) == pytest.approx(0.6 if pattern == "0.6" else 0.5, abs=0.005)
    assert report.stages[-1].perplexity["text"] == pytest.approx(perplexity(saved, tokens(4, seed=2)))
    assert report.stages[-1].perplexity == report.stages[-2].perplexity
    assert report.stages[0].sparsity == 0
    if pattern == "2:4":
        groups = saved.model.layers[0].mlp.up_proj.weight.view(-1, 4)
        assert ((groups == 0).sum(1) == 2).all()


def test_the_report_says_what_was_done_and_what_it_cost(tmp_path):
    report = run(tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written == json.loads(json.dumps(report.to_dict()))
    assert written["recipe"] == "balanced"
    assert written["arguments"]["criterion"] == "wanda"
    assert written["arguments"]["r"] == 4
    assert not any(name.endswith("_dir") for name in written["arguments"])
    assert written["texts"]["train"] == {"sequences": 16, "length": 10, "digest": written["texts"]["train"]["digest"]}
    assert written["pruning"]["sparsity"] == 0.5
    assert len(written["reconstruction"]["regions"]) == 3
    stages = {stage["name"]: stage for stage in written["stages"]}
    assert stages["reconstructed"]["tokens"] == 8 * 10
    assert stages["retrained"]["tokens"] == 4 * 1 * 10
    assert stages["retrained"]["seconds"] > 0
    lines = str(report).splitlines()
    assert lines[0] == "| stage | perplexity | sparsity | tokens | minutes |"
    assert len(lines) == 2 + len(stages)


def test_the_stages_are_those_of_the_functions(tmp_path):
    """The first half of "balanced" is a call of `reconstruct`, and "fast" is a call of `prune`."""
    pruned = lively("llama")
    calibration = [{"input_ids": row[None]} for row in tokens()[:8]]
    swaps, least_squares = Swap(tolerance=2e-3, candidates=4), LeastSquares(tolerance=5e-3)
    prune(pruned, 0.5, calibration, criterion="wanda", refinement=swaps, update=least_squares)
    fast = lively("llama")
    run(tmp_path, "fast", fast)
    assert_same_weights(fast, pruned)
    expected = lively("llama")
    reconstruct(expected, 0.5, [{"input_ids": tokens()[i : i + 2]} for i in range(0, 8, 2)], criterion="wanda")
    model = lively("llama")
    run(tmp_path / "balanced", model=model, adapter="none", max_steps=1, learning_rate=0.0)
    # Another optimiser step size gives other weights, but the masks are chosen in the same way.
    ours, theirs = zeros_of(model), zeros_of(expected)
    assert_same_zeros(model, ours)
    first = next(name for name in ours if "q_proj" in name)
    assert (ours[first] == theirs[first]).all()


def test_a_stopped_run_is_resumed_to_the_same_model(tmp_path):
    whole = lively("llama")
    run(tmp_path / "whole", model=whole)
    made = load_recipe("balanced", tmp_path / "stopped", **SMALL)
    stopper = _Stop(3)
    with pytest.raises(RuntimeError, match="stopped reconstruction"), _added(stopper):
        compress(lively("llama"), made, tokens())
    report = run(tmp_path / "stopped", resume=True)
    assert report.resumed
    assert not (tmp_path / "stopped" / "reconstruction").exists()
    reached = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stopped" / "sparse")
    assert_same_weights(reached, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "sparse"))


def test_resuming_where_nothing_is_starts_anew(tmp_path):
    assert not run(tmp_path, resume=True).resumed


def test_calibration_text_and_several_evaluation_texts(tmp_path):
    texts = {"a": tokens(2, seed=3), "b": tokens(2, seed=4)}
    report = run(tmp_path, "fast", calibration=tokens(9, seed=5), evaluation=texts)
    assert str(report).startswith("| stage | perplexity, a | perplexity, b | sparsity | tokens | minutes |")
    assert report.texts["calibration"]["sequences"] == 9
    assert run(tmp_path / "none", "fast", evaluation=None).stages[0].perplexity == {}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_hold_arguments_and_no_sparsity(name):
    """The sparsity is the user's choice, so every recipe serves every pattern."""
    values = recipe.read_recipe(name)
    assert not {"sparsity", "pattern", "output_dir", "seed"} & values.keys()
    text = (Path(recipe.__file__).parent / f"{name}.yaml").read_text()
    assert text.startswith("# ")


def test_a_recipe_of_ones_own_is_a_file(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"criterion": "magnitude", "recovery": "retrain", "adapter": "scaled_lora", "r": 2}))
    made = load_recipe(own, tmp_path / "out", pattern="4:8", max_steps=3)
    assert (made.args.criterion, made.args.pattern, made.args.max_steps) == ("magnitude", "4:8", 3)
    assert made.adapter.config().peft_type == "SCALED_LORA"
    assert load_recipe("fast", tmp_path / "out", adapter="none").adapter.config() is None


def test_numbers_of_a_recipe_are_read_as_they_are_written(tmp_path):
    (tmp_path / "own.yaml").write_text("pattern: 2:4\nlearning_rate: 1e-3\nwarmup_steps: 0.1\nmax_steps: 3\n")
    args = load_recipe(tmp_path / "own.yaml", tmp_path / "out").args
    assert (args.pattern, args.learning_rate, args.warmup_steps, args.max_steps) == ("2:4", 1e-3, 0.1, 3)


def test_each_adapter_is_scaled_as_its_method_is():
    assert AdapterArguments().config().lora_alpha / AdapterArguments().r == 2
    assert AdapterArguments("scaled_lora").config().lora_alpha == ScaledLoRAConfig(r=16).lora_alpha
    assert AdapterArguments("scaled_lora", lora_alpha=8).config().lora_alpha == 8


class _Stop(StopAt):
    """Stops a run at a step."""


class _added:
    """Adds a callback to every trainer that is made within the context."""

    def __init__(self, callback):
        self.callback = callback

    def __enter__(self):
        from peft_sparse.recipes import compression

        self.former, callback = compression.SparseTrainer, self.callback

        def made(*args, callbacks, **kwargs):
            return self.former(*args, callbacks=[*callbacks, callback], **kwargs)

        compression.SparseTrainer = made

    def __exit__(self, *error):
        from peft_sparse.recipes import compression

        compression.SparseTrainer = self.former
