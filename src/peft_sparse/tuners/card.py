"""What the model card of a saved adapter says to a stranger: PEFT alone does not know the method."""

from pathlib import Path

from huggingface_hub import ModelCard


HEADING = "## How to load this adapter"

TEXT = """
{heading}

PEFT learns this adapter's method from the package `peft_sparse`; without it, loading fails with
`KeyError: '{peft_type}'`.

```
pip install peft_sparse
```

```py
import peft_sparse  # registers the method
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("...")
model = model.merge_and_unload()  # a plain model, every zero kept
```

It adapts the pruned base model it was trained on{sparsity}, and checks that the zeros are the same.
"""


def complete_card(folder: str, peft_type: str, sparsity: float | None) -> None:
    """Add tags and loading instructions to the card that PEFT wrote into `folder`; do nothing if there is none."""
    path = Path(folder) / "README.md"
    if not path.exists():
        return
    card = ModelCard.load(path)
    tags = card.data.tags or []
    card.data.tags = [*tags, *(tag for tag in ("peft_sparse", "sparse", "pruned") if tag not in tags)]
    if HEADING not in card.text:
        share = f", {sparsity:.1%} of its adapted weights being zero" if sparsity is not None else ""
        card.text += TEXT.format(heading=HEADING, peft_type=peft_type, sparsity=share)
    card.save(path)
