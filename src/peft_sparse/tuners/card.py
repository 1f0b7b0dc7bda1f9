"""What model cards tell: how an adapter is loaded, and how sparse a model is.

`SparseLoraConfig.save_pretrained` and `hub` write the cards of adapters, and `SparseTrainer` those of plain models.
"""

import os
import re
from pathlib import Path

from huggingface_hub import ModelCard


TAGS = ("peft_sparse", "sparse", "pruned")

# A weight with fewer zeros is called dense.
PRUNED = 0.01

ADAPTER_HEADING = "## How to load this adapter"
ADAPTER = """
The method of this adapter comes from the package `peft_sparse`. Import the package before you load the adapter.
Otherwise PEFT raises `KeyError: '{peft_type}'`.

```
pip install peft_sparse
```

```py
import peft_sparse  # registers the method with PEFT
from peft import PeftModel
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{base}")  # the pruned base model
model = PeftModel.from_pretrained(model, "...")  # this adapter
model = model.merge_and_unload()  # a plain model with the same zeros
```

The adapter belongs to the pruned base model it was trained on.{origin}{sparsity} {mask}
"""
NAMED = " That model was loaded from `{base}`, which may hold the weights from before pruning."
UNNAMED = (
    " That model was not loaded from the Hub. If you share the adapter, share the pruned base model and name it here."
)
WITH_MASK = "It holds the mask, so it can also be loaded onto the dense base model, which it then prunes."
WITHOUT_MASK = "Loading checks that the base model has the same zeros."

RESIDUAL = """
This is an ordinary LoRA adapter. Loading it needs no package but `peft`. It corrects the outputs of a pruned model:
`peft_sparse.residual_lora` computed it from what pruning took away.

```py
from peft import PeftModel
from transformers import {auto_class}

model = {auto_class}.from_pretrained("...")  # the pruned base model
model = PeftModel.from_pretrained(model, "...")  # this adapter
```

The adapter belongs to the pruned base model, of whose corrected weights {sparsity} are zero. PEFT does not check this:
on the dense model, the outputs are wrong. Merging the adapter, as `merge_and_unload` does it, fills the zeros of the
base. To keep the zeros, keep the adapter beside the base.
"""

PLAIN_HEADING = "## Sparsity"
PLAIN = """
{sparsity} of the prunable weights of this model are zero. The model was saved with `peft_sparse`, which keeps
zeros in training. It is a plain checkpoint: loading it needs no package but its own library, and no adapter.
"""

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def describe_adapter(
    folder: str,
    peft_type: str,
    sparsity: float | None,
    *,
    save_mask: bool,
    task_type: str | None = None,
    base: str | None = None,
) -> None:
    """Write into the model card in `folder` how to load the adapter. A folder without a card gets one.

    A second call changes nothing, or replaces what the first one wrote. A folder of this machine in which the base
    model lay is not told.

    Args:
        folder: folder of the saved adapter.
        peft_type: value of the `PeftType`, such as "MASK_LORA".
        sparsity: mean sparsity of the adapted weights, in [0, 1), or None if it is not known.
        save_mask: whether the adapter holds its mask.
        task_type: value of the `TaskType` of the adapter, such as "CAUSAL_LM". None is shown as a causal model.
        base: name or folder of the base model.
    """
    named = base if is_hub_name(base) else None
    text = ADAPTER.format(
        peft_type=peft_type,
        auto_class=AUTO_CLASSES.get(str(task_type or "CAUSAL_LM"), "AutoModel"),
        base=named or "...",
        origin=NAMED.format(base=named) if named else UNNAMED,
        sparsity=f" Its adapted weights have a mean sparsity of {sparsity:.1%}." if sparsity is not None else "",
        mask=WITH_MASK if save_mask else WITHOUT_MASK,
    )
    _complete(folder, ADAPTER_HEADING, text, sparsity, base)


def describe_residual(folder: str, sparsity: float, *, task_type: str | None = None, base: str | None = None) -> None:
    """Write into the model card in `folder` that the adapter corrects a pruned model, and what merging does.

    Args:
        folder, task_type, base: as in `describe_adapter`.
        sparsity: the fraction of zeros in the corrected weights.
    """
    text = RESIDUAL.format(
        auto_class=AUTO_CLASSES.get(str(task_type or "CAUSAL_LM"), "AutoModel"),
        sparsity=f"{sparsity:.1%}",
    )
    _complete(folder, ADAPTER_HEADING, text, sparsity, base)


def describe_plain_model(folder: str, sparsity: float, base: str | None = None) -> None:
    """Write into the model card in `folder` how sparse the model is. A folder without a card gets one.

    Args:
        folder: folder of the saved model.
        sparsity: the fraction of zeros in the prunable weights.
        base: name or folder of the model from which it was made.
    """
    _complete(folder, PLAIN_HEADING, PLAIN.format(sparsity=f"{sparsity:.1%}"), sparsity, base)


def is_hub_name(name: str | None) -> bool:
    """Return whether `name` can be that of a model on the Hub. A folder that exists is none."""
    return bool(name and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII)) and not os.path.isdir(str(name))


def _complete(folder: str, heading: str, text: str, sparsity: float | None, base: str | None) -> None:
    path = Path(folder) / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard("---\nlibrary_name: transformers\n---\n")
    # The reader of a card cannot use a folder of another machine, and its name may be private.
    bases = _listed(card.data.get("base_model") or base)
    card.data["base_model"] = (
        (bases if len(bases) > 1 else bases[0]) if bases and all(map(is_hub_name, bases)) else None
    )
    pruned = sparsity is None or sparsity > PRUNED
    tags = [tag for tag in _listed(card.data.get("tags")) if not _names_a_folder(tag)]
    card.data["tags"] = [*tags, *(tag for tag in (TAGS if pruned else TAGS[:1]) if tag not in tags)]
    card.text = _with_section(_without_folder(card.text, base), heading, text)
    card.save(path)


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _names_a_folder(tag: str) -> bool:
    kind, _, name = tag.rpartition(":")
    return kind.startswith("base_model") and not is_hub_name(name)


def _without_folder(text: str, base: str | None) -> str:
    """Return `text` without the folder of the base model, also where it was made a link to the Hub."""
    if not base or is_hub_name(base):
        return text
    text = text.replace(f"[{base}](https://huggingface.co/{base})", "the pruned base model")
    # A relative folder may have the name of a common word.
    return text.replace(base, "the pruned base model") if os.path.isabs(base) else text


def _with_section(text: str, heading: str, section: str) -> str:
    """Return `text` with one section under `heading`: in the place of the one that is there, or at the end."""
    written = f"{heading}\n\n{section.strip()}\n"
    # Up to the next heading. In a block of code, a line that begins with a number sign would be taken for one.
    old = re.compile(rf"^{re.escape(heading)}\n.*?(?=^#{{1,6}} |\Z)", re.DOTALL | re.MULTILINE)
    if old.search(text):
        return old.sub(lambda found: written + ("\n" if found.end() < len(text) else ""), text, count=1)
    return f"{text.rstrip()}\n\n{written}".lstrip("\n")
