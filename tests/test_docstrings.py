"""Public docstrings stand alone: every argument is described, and shared arguments have one text everywhere."""

import inspect
import re

import pytest

import peft_sparse
from peft_sparse import PruningCallback, prune, prune_checkpoint, prune_structured, reconstruct, reconstruct_checkpoint


PUBLIC = {name: getattr(peft_sparse, name) for name in peft_sparse.__all__}
# What describes the pruning: the same arguments, in the same order, wherever something is pruned.
PRUNING = [
    "pattern",
    "calibration",
    "sparsity",
    "criterion",
    "group",
    "allocation",
    "refinement",
    "update",
    "target_modules",
    "exclude_modules",
    "prune_tied",
    "on_unreached",
    "batch_size",
    "activations",
]
PRUNERS = [prune, prune_checkpoint, PruningCallback, reconstruct, reconstruct_checkpoint]


def described(thing):
    """{argument: text} of the Args section of a docstring."""
    section = re.search(r"\nArgs:\n(.*?)(?=\n\S|\Z)", inspect.getdoc(thing) or "", flags=re.DOTALL)
    if section is None:
        return {}
    entries = re.findall(r"^    (\w[\w, ]*): (.*?)(?=^    \w|\Z)", section[1] + "\n", flags=re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


@pytest.mark.parametrize("function", PRUNERS, ids=lambda function: function.__name__)
def test_the_arguments_of_pruning_are_the_same_everywhere(function):
    names = list(inspect.signature(function).parameters)
    assert [name for name in names if name in PRUNING] == PRUNING
    texts, expected = described(function), described(prune)
    # Where every batch is a step of training, its size has another default.
    for name in set(PRUNING) - {"calibration", "group", "batch_size"}:
        assert texts[name] == expected[name], name
    assert texts["batch_size"].partition(" By default")[0] == expected["batch_size"].partition(" By default")[0]


@pytest.mark.parametrize("function", [*PRUNERS, prune_structured], ids=lambda function: function.__name__)
def test_the_forms_of_calibration_data_are_the_same_everywhere(function):
    # A sentence about the function itself may follow.
    forms = described(prune)["calibration"].partition(" A criterion")[0]
    assert described(function)["calibration"].startswith(forms)


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if inspect.isfunction(thing)])
def test_every_argument_of_a_public_function_is_described(name):
    assert set(described(PUBLIC[name])) == set(inspect.signature(PUBLIC[name]).parameters)


@pytest.mark.parametrize("name", PUBLIC)
def test_no_docstring_sends_the_reader_elsewhere_for_its_arguments(name):
    assert not re.search(r"everything else|every other argument|as in `prune`\.$", inspect.getdoc(PUBLIC[name]))
