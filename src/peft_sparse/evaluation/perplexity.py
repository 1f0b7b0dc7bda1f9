"""Perplexity by the protocol the pruning papers share."""

import math

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..calibration.inputs import evaluation_mode


@torch.no_grad()
def perplexity(model: nn.Module, sequences: Tensor, batch_size: int = 1, description: str = "perplexity") -> float:
    r"""Return exp of the mean cross entropy of a causal language model over all tokens but the first of each sequence.

    With `sequences` cut from `"\n\n".join(documents)` without overlap, the tail dropped, this is the protocol of
    SparseGPT, Wanda and PERP; the length of the sequences is part of a number's meaning.

    Args:
        sequences: token ids (sequences, tokens), no padding.

    Raises:
        ValueError: the loss is not finite.
    """
    device = next(model.parameters()).device
    losses = []
    with evaluation_mode(model):
        for batch in tqdm(sequences.split(batch_size), desc=description, unit="batch", leave=False, disable=None):
            batch = batch.to(device)
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            losses.append(nn.functional.cross_entropy(logits.float(), batch[:, 1:].flatten(), reduction="sum"))
    loss = float(torch.stack(losses).double().sum()) / (sequences.shape[0] * (sequences.shape[1] - 1))
    if not math.isfinite(loss):
        raise ValueError(f"Expected a finite loss, got {loss}: the model's outputs hold NaN or infinity.")
    return math.exp(loss)
