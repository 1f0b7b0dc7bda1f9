"""Every refusal of `evaluation/`, with its words."""

import importlib.util
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from lm_eval.tasks import TaskManager
from torch import nn
from transformers import AutoModel

from peft_sparse import perplexity
from peft_sparse.evaluation import (
    LoadedModel,
    compare_models,
    evaluate_tasks,
    generation_speeds,
    kernel_speed,
    load_model,
    metric_path,
    text_perplexity,
)
from peft_sparse.evaluation.domains import PerplexityReport, perplexity_by_domain

from conftest import CONFIGS, tiny
from evaluated import TEXT, save_adapter, save_dense, write_rows
from refusing import TOKENS, llama, nan_norm
from texts import byte_tokenizer, character_tokenizer


DENSE = PerplexityReport({"c4": 9.0}, {"c4": 28}, {})


def tasks(*names, **options):
    return evaluate_tasks(llama(), character_tokenizer(), list(names), **options)


def tasks_of(rows, *names):
    folder = Path(tempfile.mkdtemp(prefix="rows-", dir="."))
    return tasks(*names, data_dir=write_rows(folder, rows))


def without_lm_eval():
    with patch.dict(sys.modules, {"lm_eval.evaluator": None}):
        return tasks_of(None, "rte")


OTHER_METRIC = """
task: other
dataset_path: json
dataset_kwargs: {data_files: {validation: rows.jsonl}, cache_dir: cache}
validation_split: validation
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
metric_list: [{metric: perplexity}]
"""


def tasks_of_lm_eval(name):
    """One of two tasks. lm-eval itself has thousands, and reading their definitions takes seconds."""
    Path("definitions").mkdir(exist_ok=True)
    Path("definitions/other.yaml").write_text(OTHER_METRIC)
    Path("rows.jsonl").write_text('{"text": "A"}\n')
    manager = TaskManager(include_defaults=False, include_path="definitions")
    with patch("lm_eval.tasks.TaskManager", lambda **_: manager):
        return tasks(name)


def metric_without_tokenizer():
    """The metric from its file: `evaluate.load` makes a copy of it."""
    spec = importlib.util.spec_from_file_location("perplexity_metric", metric_path() + "/perplexity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Perplexity._compute(None, TEXT, llama())


def adapter_without_base():
    adapter = save_adapter("adapter", save_dense("base"))
    Path("base").rename("elsewhere")
    return load_model(adapter)


def of_images():
    tiny("vit").save_pretrained("vit")
    return "vit"


def other_tokenizers():
    own = [LoadedModel(str(n), llama(), make()) for n, make in enumerate((character_tokenizer, byte_tokenizer))]
    return compare_models(own, TEXT, window=4, rounds=0)


REFUSALS = [
    (lambda: perplexity("folder", TOKENS), TypeError, "Expected `model` as a language model, an nn.Module, got str"),
    (
        lambda: perplexity(tiny("gpt2"), [TOKENS, torch.zeros(1, 99, dtype=torch.long)]),
        ValueError,
        r"GPT2LMHeadModel does not run on batch 1 of `sequences`, .* \(1, 99\)}. Give .* It raised IndexError: index",
    ),
    (
        lambda: generation_speeds({"bert": AutoModel.from_config(CONFIGS["llama"]).layers[0]}),
        TypeError,
        "Expected models that generate, and 'bert' is a LlamaDecoderLayer. Give causal language models",
    ),
    (lambda: load_model("dense", dtype="float17"), ValueError, "Expected `dtype` as \"auto\", .* got 'float17'"),
    (
        lambda: compare_models(["dense"], limit=5),
        ValueError,
        "`limit` has no effect without `tasks`, which are evaluated. Give `tasks`, or leave it out",
    ),
    (lambda: compare_models(["dense"], window=64), ValueError, "`window` has no effect without `documents`"),
    (lambda: compare_models("dense"), TypeError, "Expected `models` as a list of folders, .*, got str"),
    (lambda: compare_models([llama()]), TypeError, r"Expected `models` as a list .* got \['LlamaForCausalLM'\]"),
    (lambda: kernel_speed(llama().to("meta")), ValueError, "q_proj' is not in memory. Load the model without"),
    (lambda: perplexity(llama(nan_norm), TOKENS), ValueError, "Expected a finite loss, got nan"),
    (
        lambda: perplexity(llama(), TOKENS[:, :1]),
        ValueError,
        "at least one token to predict, got none. Give sequences",
    ),
    (lambda: perplexity(llama(), [{"input_ids": TOKENS, "labels": TOKENS * 0 - 100}]), ValueError, "to predict, got"),
    (
        lambda: perplexity(llama(), [{"inputs_embeds": torch.zeros(1, 4, 16)}]),
        ValueError,
        "Perplexity needs `labels` or `input_ids`, got a batch of 'inputs_embeds'. Add `labels`",
    ),
    (
        lambda: perplexity(AutoModel.from_config(CONFIGS["llama"]), TOKENS),
        ValueError,
        "Perplexity needs logits, and LlamaModel returned none. Give a model with a language-modelling head",
    ),
    (
        lambda: perplexity(llama(), [{"input_ids": TOKENS, "labels": TOKENS[:, 1:]}]),
        ValueError,
        r"logits for each label, got logits \(4, 8, 61\) and labels \(4, 7\) from LlamaForCausalLM. Give a language",
    ),
    (
        lambda: perplexity_by_domain(llama(), {"input_ids": TOKENS}),
        ValueError,
        "Expected `domains` as a dict of sequences by the name of a domain, got 'input_ids'. Write",
    ),
    (
        lambda: perplexity_by_domain(llama(), {"c4": TOKENS, "code": TOKENS}, dense=DENSE),
        ValueError,
        "Expected the domains of `domains` in `dense`, and it lacks 'code'. Measure the dense model on the same",
    ),
    (
        lambda: perplexity_by_domain(llama(), {"c4": TOKENS[:1]}, dense=DENSE),
        ValueError,
        r"text of domain 'c4' on which the dense model was measured \(28 tokens\), got 7 tokens. Measure both",
    ),
    (
        lambda: perplexity_by_domain(llama(), {"c4": TOKENS, "code": []}),
        ValueError,
        r"`domains\['code'\]` holds no batch. Give at least one sequence",
    ),
    (
        lambda: text_perplexity(llama(), character_tokenizer(), TEXT, window=1),
        ValueError,
        "Expected `window` of 2 or more, got 1. A model predicts every token but the first",
    ),
    (
        lambda: text_perplexity(llama(), character_tokenizer(), TEXT, window=1000),
        ValueError,
        "The text is too short for one `window` of 1000 tokens. Lower `window`",
    ),
    (
        lambda: text_perplexity(tiny("opt"), character_tokenizer(), TEXT, window=65),
        ValueError,
        "The model reads at most 64 tokens at once, got `window=65`. Use a window of 64",
    ),
    (
        lambda: load_model(of_images()),
        ValueError,
        "Expected a causal language model, and 'vit' is a ViTForImageClassification. In Python, `prune`",
    ),
    (
        lambda: text_perplexity(llama(), character_tokenizer(), TEXT, window=4, max_windows=0),
        ValueError,
        "Expected `max_windows` of 1 or more, or None for the whole text, got 0",
    ),
    (lambda: metric_path("rouge"), ValueError, "the name of a metric of peft_sparse, one of perplexity, got 'rouge'"),
    (metric_without_tokenizer, ValueError, "A model in memory needs its tokenizer. Give `tokenizer=` to `compute`"),
    (
        without_lm_eval,
        ImportError,
        r"Expected the package `lm-eval`, and importing `lm_eval.evaluator` failed: .* pip install 'peft_sparse\[eval",
    ),
    (lambda: tasks(), ValueError, 'Expected `tasks` as names of tasks, each once, got none. Write "perp"'),
    (lambda: tasks("perp", "rte"), ValueError, "each once, got 'perp', 'rte'"),
    (lambda: tasks("rte", limit=0), ValueError, "Expected `limit` of 1 or more rows, or None for all of them, got 0"),
    (
        lambda: evaluate_tasks(nn.Linear(2, 2), character_tokenizer(), "rte"),
        ValueError,
        "lm-eval needs a causal language model of transformers, got Linear. Give a model that",
    ),
    (
        lambda: tasks_of_lm_eval("rtee"),
        ValueError,
        "Expected tasks that lm-eval knows, got 'rtee'. `lm_eval ls tasks` lists",
    ),
    (
        lambda: tasks_of_lm_eval("other"),
        ValueError,
        "Expected tasks with an accuracy, and 'other' has perplexity. Leave it out, or evaluate it with",
    ),
    (
        lambda: tasks_of(None, "piqa"),
        ValueError,
        "`data_dir` has a known format for boolq, .*, got the task 'piqa'. Leave out `data_dir`",
    ),
    (
        lambda: tasks_of({"rte-validation": [{"sentence1": "A", "label": 1}]}, "rte"),
        ValueError,
        "Expected the fields sentence1, sentence2, label in each row of rte-validation.jsonl, and one row lacks sent",
    ),
    (
        lambda: tasks_of({"rte-validation": []}, "rte"),
        ValueError,
        "Expected rows of RTE in rte-validation.jsonl, found none. Write one JSON object per line",
    ),
    (
        lambda: tasks_of({"rte-validation": []}, "boolq"),
        FileNotFoundError,
        "Expected boolq-validation.jsonl or boolq-validation.jsonl.gz in '.*', found neither. Put the rows of BoolQ",
    ),
    (
        lambda: load_model("nowhere"),
        FileNotFoundError,
        "Expected a model or an adapter at 'nowhere', found neither config.json nor adapter_config.json. Give a fold",
    ),
    (
        adapter_without_base,
        FileNotFoundError,
        "Expected the base of the adapter 'adapter' at 'base', as its configuration says, and found no model there",
    ),
    (lambda: compare_models([]), ValueError, "Expected at least one model, got none. Give folders or Hub ids"),
    (
        lambda: compare_models([save_dense("dense")], rounds=-1),
        ValueError,
        "Expected `rounds` of 0 or more, and `new_tokens` of 1 or more, got -1 and 32. `rounds=0` measures no speed",
    ),
    (
        lambda: compare_models([LoadedModel("dense", llama(), None), save_dense("dense")]),
        ValueError,
        "Expected models with different names, got 'dense' twice. Rename the model in memory",
    ),
    (
        lambda: compare_models([save_dense("dense"), "./dense"]),
        ValueError,
        r"Expected different models, got 'dense' twice. Name each model once",
    ),
    (
        other_tokenizers,
        ValueError,
        "Expected models with one tokenizer, and that of '1' makes other tokens of the text than that of the first",
    ),
    (
        lambda: generation_speeds({"one": llama()}, rounds=0),
        ValueError,
        "Expected `new_tokens` and `rounds` of 1 or more, got 32 and 0",
    ),
    (
        lambda: kernel_speed(llama(), tokens=(0,)),
        ValueError,
        r"Expected `tokens` and `rounds` of 1 or more, got \[0\] and 15",
    ),
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_the_refusal_says_what_to_do(refused, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        refused()
