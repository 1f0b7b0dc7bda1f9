"""What tests of evaluation share: a folder with a tiny dense model, a pruned one and an adapter, and rows of tasks."""

import json

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_sparse import MaskLoRAConfig, prune

from conftest import tiny
from texts import character_tokenizer


TEXT = ["A LINE OF TEXT, AND MORE OF IT. " * 3, "ANOTHER DOCUMENT: 1 + 1 = 2; 2 + 2 = 4."]


def save_dense(folder):
    tiny("llama").save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return str(folder)


def save_pruned(folder, pattern=0.5):
    model = tiny("llama")
    prune(model, pattern)
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return str(folder)


def save_adapter(folder, base):
    """An adapter that changes what the model computes, without a tokenizer of its own."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), MaskLoRAConfig(r=4, target_modules="all-linear")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mask_lora_B" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    return str(folder)


def task_rows():
    """Some rows of each of the seven tasks, with the fields of the Hub's data sets, by the name of the file."""
    choices = {"text": ["ICE", "FIRE", "SAND"], "label": ["A", "B", "C"]}
    count = range(5)
    return {
        "boolq-validation": [{"passage": f"SNOW {i}.", "question": "is it cold", "answer": i > 2} for i in count],
        "rte-validation": [
            {"sentence1": f"IT RAINS {i}.", "sentence2": "IT IS WET.", "label": i % 2, "idx": i} for i in count
        ],
        "hellaswag-validation": [
            {
                "activity_label": "BAKING",
                "ctx_a": f"A COOK TAKES {i} EGGS.",
                "ctx_b": "then he",
                "endings": ["bakes.", "sleeps [x].", "flies off.", "swims."],
                "label": str(i % 4),
            }
            for i in count
        ],
        "winogrande_xl-validation": [
            {"sentence": f"ANN MET EVE {i} TIMES AND _ WON.", "option1": "ANN", "option2": "EVE", "answer": "2"}
            for i in count
        ],
        "arc_easy-test": [{"question": f"WHAT IS HOT, {i}?", "choices": choices, "answerKey": "B"} for i in count],
        "arc_challenge-test": [{"question": f"WHAT MELTS {i}?", "choices": choices, "answerKey": "A"} for i in count],
        "openbookqa-test": [{"question_stem": f"A DUNE {i} IS", "choices": choices, "answerKey": "C"} for i in count],
    }


def write_rows(folder, rows=None):
    folder.mkdir(exist_ok=True)
    for name, found in (rows or task_rows()).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder
