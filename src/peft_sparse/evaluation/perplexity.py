"""Measures perplexity by the protocol of the pruning papers."""

import math
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm import tqdm

from ..calibration.inputs import (
    Calibration,
    as_inputs,
    counted,
    evaluation_mode,
    labels_of,
    model_arguments,
    output_of,
    without_padding,
)
from ..calibration.label_positions import label_offset
from ..calibration.residence import running
from ..model.blocks import base_model, is_encoder_decoder
from ..model.offload import execution_device


def perplexity(model: nn.Module, sequences: Calibration, batch_size: int = 1) -> float:
    r"""Return the perplexity of a language model: exp of its mean cross entropy, over all tokens that are counted.

    A causal model predicts every token of a sequence except the first. An encoder-decoder predicts its labels. Labels
    of other models that are not the tokens belong to the outputs with which the model's own loss compares them. Four
    kinds of tokens are not counted: padding, where `attention_mask` is 0 (in an encoder-decoder:
    `decoder_attention_mask`); tokens that are predicted from padding; labels of -100; and tokens that a `token_mask`
    (`decoder_token_mask`) in a batch leaves out.

    SparseGPT, Wanda and PERP measure on the test split of WikiText-2. The text is joined by "\n\n", tokenised in one
    piece and cut into sequences without overlap. `pack_sequences` does this. Perplexities of sequences of different
    lengths cannot be compared.

    Args:
        model: a causal language model or an encoder-decoder with logits.
        sequences: token ids (sequences, tokens) without padding, what a tokenizer returns, or an iterable of model
            inputs (dicts), such as a list, a `DataLoader` or a tokenised `datasets.Dataset`. An encoder-decoder gets
            token ids as inputs of its encoder and of its decoder. If model inputs have no `labels`, the labels are the
            tokens: `decoder_input_ids` except the first, or `input_ids` if there are none.
        batch_size: how many sequences run together, where they do not come in batches.

    Returns:
        The perplexity, 1 or more.

    Raises:
        TypeError: `model` is no model.
        ValueError: `sequences` is neither token ids nor model inputs, is empty, or holds no token that is counted; a
            batch has neither labels nor tokens; the model does not run on a batch; it returns no logits, or not one
            position per label; the loss is not finite.
    """
    return exponential(mean_loss(model, sequences, batch_size, "sequences")[0])


def exponential(loss: float) -> float:
    """Return exp of a loss, infinity where it exceeds the range of a float. `math.exp` raises an error there."""
    return float(torch.tensor(loss, dtype=torch.float64).exp())


@torch.no_grad()
def mean_loss(model: nn.Module, sequences: Calibration, batch_size: int, argument: str) -> tuple[float, int]:
    """Return (mean cross entropy, number of tokens that are counted), see `perplexity`.

    Args:
        model, sequences, batch_size: the arguments of `perplexity`.
        argument: what the caller calls `sequences`, for error messages.

    Raises:
        ValueError: see `perplexity`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected `model` as a language model, an nn.Module, got {type(model).__name__}.")
    inputs = as_inputs(model, sequences, batch_size, argument)
    device = execution_device(model)
    losses: list[Tensor] = []
    counts: list[Tensor] = []
    with evaluation_mode(model):
        offset = _offset(model, inputs)
        for batch in tqdm(inputs, desc="perplexity", unit="batch", leave=False, disable=None):
            with running(model, batch, f"batch {len(losses)} of `{argument}`"):
                logits, labels = _predictions(model, send_to_device(batch, device), offset)
            losses.append(nn.functional.cross_entropy(logits.float(), labels, reduction="sum"))
            counts.append(labels.ne(-100).sum())
    count = int(torch.stack(counts).sum())
    if count == 0:
        raise ValueError(
            f"Expected `{argument}` with at least one token to predict, got none. Give sequences of two tokens or "
            "more, and labels other than -100."
        )
    loss = float(torch.stack(losses).double().sum()) / count
    if not math.isfinite(loss):
        raise ValueError(
            f"Expected a finite loss, got {loss}: the model's outputs hold NaN or infinity. Check its weights, or "
            "run it in float32 or bfloat16."
        )
    return loss, count


def _offset(model: nn.Module, inputs: list[dict[str, Any]]) -> int:
    """Return 1 if output i predicts the label of position i + 1, and 0 if it predicts that of position i."""
    if is_encoder_decoder(model):
        return 0
    first = send_to_device(inputs[0], execution_device(model)) if inputs else {}
    labels, tokens = first.get("labels"), first.get("input_ids")
    if labels is None or labels.dim() != 2 or (tokens is not None and labels.shape != tokens.shape):
        return 1
    if tokens is not None and bool(((labels == tokens) | (labels == -100)).all()):
        # The labels are the tokens, and each output of a causal model predicts the next token.
        return 1

    def loss_of(batch: dict[str, Any]) -> tuple[Any, Any]:
        outputs = model(**model_arguments(model, batch))
        return output_of(outputs, "loss"), outputs

    loss = loss_of(first)[0]
    if not isinstance(loss, Tensor) or not loss.isfinite().all():
        return 1
    return label_offset(
        loss_of, first, type(base_model(model)).__name__, "Give labels that are the tokens, or leave them out."
    )


def _predictions(model: nn.Module, batch: dict[str, Any], offset: int) -> tuple[Tensor, Tensor]:
    """Return logits (tokens, vocabulary) and the labels (tokens,) that they are compared with."""
    labels = _labels(model, batch, offset)
    given = batch.pop("labels", labels)
    if is_encoder_decoder(model) and "decoder_input_ids" not in batch:
        # The model makes the decoder's inputs from the labels. Elsewhere it would only compute a loss from them.
        batch["labels"] = given
    logits = output_of(model(**model_arguments(model, batch)), "logits")
    name = type(base_model(model)).__name__
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"Perplexity needs logits, and {name} returned none. Give a model with a language-modelling head, as "
            "`AutoModelForCausalLM` loads it."
        )
    if labels.dim() != 2 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"Expected logits for each label, got logits {tuple(logits.shape)} and labels {tuple(labels.shape)} from "
            f"{name}. Give a language model, and labels (sequences, tokens)."
        )
    if offset:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits.flatten(0, 1), labels.flatten()


def _labels(model: nn.Module, batch: dict[str, Any], offset: int) -> Tensor:
    """Return the labels of `batch` (sequences, tokens), with -100 where they are not counted."""
    labels = batch.get("labels")
    if labels is None:
        if "input_ids" not in batch:
            raise ValueError(
                f"Perplexity needs `labels` or `input_ids`, got a batch of {', '.join(map(repr, batch))}. Add "
                "`labels`."
            )
        return labels_of(batch)
    labels = counted(labels, batch, shifted=is_encoder_decoder(model))
    mask = batch.get("decoder_attention_mask" if is_encoder_decoder(model) else "attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != labels.shape:
        return labels
    return without_padding(labels, mask) if offset else labels.masked_fill(~mask.bool(), -100)
