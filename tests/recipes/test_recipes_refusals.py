"""Every refusal of `recipes/`, with its words."""

from pathlib import Path

import pytest

from peft_sparse import compress, load_recipe
from peft_sparse.recipes import AdapterArguments, TextArguments
from peft_sparse.recipes.recipe import read_recipe

from refusing import TOKENS, llama


def of_a_list():
    Path("list.yaml").write_text("- wanda\n")
    read_recipe("list.yaml")


def of_another_file():
    Path("text.yaml").write_text("criterion: wanda\n  update: true\n")
    read_recipe("text.yaml")


def sharded():
    made = load_recipe("fast", "out", sparsity=0.5, use_cpu=True)
    made.args.deepspeed = {"zero_optimization": {"stage": 2}}
    compress(llama(), made, TOKENS)


REFUSALS = [
    (
        lambda: compress(llama(), "slow", TOKENS, sparsity=0.5),
        ValueError,
        "Expected a recipe: 'fast', 'balanced', 'best', or the path of a YAML file; got 'slow'",
    ),
    (of_a_list, ValueError, "Expected 'list.yaml' to hold names and values, such as `criterion: wanda`, got list"),
    (of_another_file, ValueError, "Expected 'text.yaml' to be YAML with names and values, .* line 2"),
    (
        lambda: load_recipe("fast", "out", criterium="wanda"),
        ValueError,
        "A recipe has no argument 'criterium'. Did you mean 'criterion'",
    ),
    (
        lambda: compress(llama(), load_recipe("fast", "out", sparsity=0.5, use_cpu=True), TOKENS, sparsity=0.6),
        TypeError,
        "A `Recipe` has its arguments already, and 'sparsity' are given beside it. Give them to `load_recipe`",
    ),
    (
        lambda: compress(llama(), "fast", TOKENS, use_cpu=True),
        ValueError,
        "A compression needs a sparsity. Give `sparsity=0.5`",
    ),
    (
        sharded,
        ValueError,
        "`compress` measures the whole model after each stage, .* in one process or with DDP",
    ),
    (lambda: TextArguments(sequence_length=1), ValueError, "`sequence_length` must be at least 2, got 1"),
    (
        lambda: AdapterArguments(adapter="lora"),
        ValueError,
        "`adapter` must be one of 'mask_lora', 'scaled_lora', 'none', got 'lora'",
    ),
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_a_refusal_says_what_to_do(tmp_path, monkeypatch, refused, error, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        refused()
