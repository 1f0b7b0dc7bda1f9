"""Instructions for loading, on the model card of a saved adapter. PEFT alone does not know the method.

`SparseLoraConfig.save_pretrained` calls `complete_card`.
"""

from pathlib import Path

from huggingface_hub import ModelCard


HEADING = "## How to load this adapter"

TEXT = """
{heading}

The method of this adapter comes from the package `peft_sparse`. Import the package before you load the adapter.
Otherwise PEFT raises `KeyError: '{peft_type}'`.

```
pip install peft_sparse
```

```py
import peft_sparse  # registers the method with PEFT
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("...")
model = model.merge_and_unload()  # a plain model with the same zeros
```

The adapter belongs to the pruned base model it was trained on.{sparsity} {mask}
"""


WITH_MASK = "It holds the mask, so it can also be loaded onto the dense base model, which it then prunes."
WITHOUT_MASK = "Loading checks that the base model has the same zeros."


def complete_card(folder: str, peft_type: str, sparsity: float | None, save_mask: bool) -> None:
    """Add tags and instructions for loading to the model card in `folder`, if there is one.

    Args:
        folder: folder of the saved adapter, where PEFT wrote `README.md`.
        peft_type: value of the `PeftType`, such as "MASK_LORA".
        sparsity: mean sparsity of the adapted weights, in [0, 1), or None if it is not known.
        save_mask: whether the adapter holds its mask.
    """
    path = Path(folder) / "README.md"
    if not path.exists():
        return
    card = ModelCard.load(path)
    tags = card.data.tags or []
    card.data.tags = [*tags, *(tag for tag in ("peft_sparse", "sparse", "pruned") if tag not in tags)]
    if HEADING not in card.text:
        share = f" Its adapted weights have a mean sparsity of {sparsity:.1%}." if sparsity is not None else ""
        mask = WITH_MASK if save_mask else WITHOUT_MASK
        card.text += TEXT.format(heading=HEADING, peft_type=peft_type, sparsity=share, mask=mask)
    card.save(path)
