"""Writes the sections of a card from its facts. What is not known is left out."""

import re
from typing import Any

from ..model.tree import is_hub_name
from .card_facts import Facts, WeightZeros, origin_of
from .card_made import how_made, method, papers
from .card_results import perplexity_section, table


# Stands in the lines that load a model until it has a name on the Hub.
HERE = "path/to/this/folder"

LOADING = {"adapter": "## How to load this adapter", "residual": "## How to load this adapter"}

ADAPTER_CODE = """
import peft_sparse  # registers the method with PEFT
from peft import PeftModel
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{base}")  # {which}
model = PeftModel.from_pretrained(model, "{repo}")  # this adapter
model = model.merge_and_unload()  # a plain model with the same zeros
"""
ADAPTER = """
The method of this adapter comes from the package `peft_sparse` (`pip install peft_sparse`). Import the package before
you load the adapter. Otherwise PEFT raises `KeyError: '{peft_type}'`.
"""
RESIDUAL_CODE = """
from peft import PeftModel
from transformers import {auto_class}

model = {auto_class}.from_pretrained("...")  # the pruned base model
model = PeftModel.from_pretrained(model, "{repo}")  # this adapter
"""
PLAIN_CODE = """
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{repo}")
"""
PACKED_CODE = """
import peft_sparse  # registers the packed format with Transformers
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{repo}")
"""
LM_EVAL = (
    "lm-eval's argument `peft=` imports no other package, so it ends in this error too. Merge the adapter and give "
    "lm-eval the merged model, or use `peft-sparse evaluate`."
)
NOT_ON_HUB = (
    "That model was not loaded from the Hub. If you share the adapter, share the pruned base model too "
    "(`SparseTrainer.save_base_model` writes it), and name it here as `base_model`."
)


def card_text(facts: Facts) -> str:
    """Return the sections of a card: summary, loading, sparsity, how it was made, perplexity, limits and papers."""
    parts = [
        _summary(facts),
        _loading(facts),
        _sparsity(facts),
        how_made(facts),
        perplexity_section(facts.done),
        _limits(facts),
        papers(facts),
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip())


def _summary(facts: Facts) -> str:
    share = f"{facts.share:.1%}" if facts.share is not None else None
    if facts.kind == "residual":
        zeros = f", of whose corrected weights {share} are zero" if share else ""
        return (
            "This is an ordinary LoRA adapter. It corrects the outputs of a pruned model" + zeros + ". "
            "`peft_sparse.residual_lora` computed it from what pruning took away."
        )
    if facts.kind == "adapter":
        base = _base_in_words(facts)
        zeros = (
            f" {share} of the entries of the adapted weights are zero, and stay zero when it is merged."
            if share
            else ""
        )
        return f"This is a {method(facts)} adapter of a pruned model{base}.{zeros}"
    named = facts.base if is_hub_name(facts.base) else origin_of(facts.base)
    of = f" It was made from [{named}](https://huggingface.co/{named})." if named else ""
    zeros = f"{share} of the {facts.counted} are zero. " if share else ""
    if facts.kind == "packed":
        return f"{zeros}The zeros are not stored: the files are packed without loss.{of}"
    return f"{zeros}This is a plain checkpoint: loading it needs no package but its own library, and no adapter.{of}"


def _peft_type(facts: Facts) -> str:
    value = facts.adapter.get("peft_type")
    return str(getattr(value, "value", value))


def _base_in_words(facts: Facts) -> str:
    named = facts.base if is_hub_name(facts.base) else origin_of(facts.base)
    return f", made from [{named}](https://huggingface.co/{named})" if named else ""


def _loading(facts: Facts) -> str:
    repo = facts.repo_id or HERE
    code = {"adapter": ADAPTER_CODE, "residual": RESIDUAL_CODE, "plain": PLAIN_CODE, "packed": PACKED_CODE}[facts.kind]
    words = ""
    base, which = "...", "the pruned base model"
    if facts.kind == "adapter":
        base, which, belongs = _base_to_load(facts)
        words = f"{ADAPTER.format(peft_type=_peft_type(facts)).strip()}\n\n"
        after = f"\n\n{belongs}\n\n{LM_EVAL}"
    elif facts.kind == "residual":
        after = (
            "\n\nThe adapter belongs to the pruned base model. PEFT does not check this: on the dense model, the "
            "outputs are wrong. Merging the adapter, as `merge_and_unload` does it, fills the zeros of the base. To "
            "keep the zeros, keep the adapter beside the base."
        )
    else:
        after = ""
    text = code.format(auto_class=facts.auto_class, base=base, which=which, repo=repo).strip()
    return f"{LOADING.get(facts.kind, '## How to load this model')}\n\n{words}```py\n{text}\n```{after}"


def _base_to_load(facts: Facts) -> tuple[str, str, str]:
    """Return what `from_pretrained` takes as the base of an adapter, what that is, and a sentence about it."""
    named = facts.base if is_hub_name(facts.base) else None
    if facts.brings_all_masks:
        found = named or origin_of(facts.base)
        words = "The adapter holds its masks. It can be loaded onto the dense base model, which it then prunes."
        return found or "...", "the base model, dense or pruned", words
    words = (
        "The adapter belongs to the pruned base model it was trained on. Loading checks that the zeros are the same."
    )
    if facts.adapter.get("save_mask"):
        words = (
            "The adapter holds its masks, and none of the pruned weights that it does not adapt. It belongs to the "
            "pruned base model it was trained on. Loading checks that these weights have their zeros."
        )
    if facts.base_is_given:
        return named or "...", "the pruned base model", words
    if named is None:
        return "...", "the pruned base model", f"{words} {NOT_ON_HUB}"
    if "pruning" in facts.done:
        words += (
            f" It was pruned after it had been loaded from `{named}`, which holds the weights from before pruning."
        )
        return "...", "the pruned base model", words
    words += f" That model was loaded from `{named}`, which may hold the weights from before pruning."
    return named, "the pruned base model", words


def _sparsity(facts: Facts) -> str:
    lines = []
    pruning = facts.done.get("pruning")
    if pruning:
        lines.append(f"Pattern: {_pattern(pruning)}.")
    if facts.weights:
        lines.append(_by_kind(facts.weights))
    sizes = [f"{name} {_bytes(value)}" for name, value in facts.sizes.items()]
    if sizes:
        lines.append(f"Size of the weights: {', '.join(sizes)}.")
    return "## Sparsity\n\n" + "\n\n".join(lines) if lines else ""


def _pattern(pruning: dict[str, Any]) -> str:
    pattern = str(pruning["pattern"])
    if re.fullmatch(r"\d+:\d+", pattern):
        return f"{pattern} ({pattern.partition(':')[0]} of every {pattern.partition(':')[2]} inputs are kept)"
    return f"unstructured, {pattern}" if re.fullmatch(r"[\d.]+", pattern) else pattern


def _by_kind(weights: tuple[WeightZeros, ...]) -> str:
    kinds: dict[str, list[WeightZeros]] = {}
    for weight in weights:
        # What follows the number of the block, without the number of an expert.
        kind = re.sub(r"\.\d+$", "", weight.name)
        kinds.setdefault(re.split(r"(?:^|\.)\d+\.", kind)[-1], []).append(weight)
    rows = [[kind, str(len(found)), _shapes(found), _range(found)] for kind, found in kinds.items()]
    return table(["layers", "weights", "shape", "sparsity"], [*rows, _total(weights)])


def _total(weights: tuple[WeightZeros, ...]) -> list[str]:
    entries = sum(weight.shape[0] * weight.shape[1] for weight in weights)
    return ["all", str(len(weights)), f"{entries:,} entries", f"{sum(w.zeros for w in weights) / entries:.4f}"]


def _shapes(weights: list[WeightZeros]) -> str:
    shapes = dict.fromkeys(weight.shape for weight in weights)
    return ", ".join(f"{rows} × {columns}" for rows, columns in shapes) if len(shapes) < 4 else "various"


def _range(weights: list[WeightZeros]) -> str:
    shares = sorted(weight.zeros / (weight.shape[0] * weight.shape[1]) for weight in weights)
    lowest, highest = f"{shares[0]:.4f}", f"{shares[-1]:.4f}"
    return lowest if lowest == highest else f"{lowest} to {highest}"


def _bytes(value: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value} B"


def _limits(facts: Facts) -> str:
    lines = []
    if facts.kind == "plain":
        lines.append(
            "The zeros are stored and multiplied like other numbers. The model takes as much memory and time as a "
            "dense one, unless a runtime uses the zeros."
        )
    elif facts.kind == "packed":
        lines.append("Packing saves disk and transfer. In memory the model is as large and as fast as a dense one.")
    if facts.done.get("stages"):
        lines.append("Quality was measured on the texts above only. Other texts and tasks may have lost more.")
    else:
        lines.append("This card holds no measurement of quality. Measure the model on your task before you use it.")
    lines.append("What is said of the base model, its licence included, holds for this model too.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)
