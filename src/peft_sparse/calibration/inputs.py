"""Turns calibration and evaluation data, in the forms that users have it, into model inputs."""

import contextlib
import copy
import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.blocks import base_model
from ..model.processes import place
from ..model.weights import to_host
from .collation import TOKEN_MASKS
from .forms import Reader, check_counts


# Token ids, model inputs, or an iterable of either: see `as_inputs`.
Calibration = Tensor | Mapping[str, Any] | Iterable[Any]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode within the context. After it, every module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def as_inputs(
    model: nn.Module, calibration: Calibration, batch_size: int | None = 1, argument: str = "calibration"
) -> list[dict[str, Any]]:
    """Return calibration data as a list of model inputs.

    Args:
        model: the model that the inputs are for.
        calibration: one of these forms.
            A tensor: token ids (sequences, tokens), or the main input of a model that takes no tokens.
            A dict: model inputs as a tokenizer returns them, as tensors or as lists.
            An iterable: dicts of single sequences or of batches; token ids (tokens,) or (1, tokens) of single
            sequences, or (sequences, tokens) of batches; or tuples whose first element is one of these, and whose
            second is a target, which is not used. A `DataLoader` and a tokenised `datasets.Dataset` are such
            iterables. Columns of a data set that the model does not take are left out.
            Sequences of different lengths are padded to the longest of their batch. An encoder-decoder gets token ids
            as inputs of its encoder and of its decoder.
        batch_size: how many sequences run together, where they do not come in batches. Batches stay as they are. None
            takes as many of one length as have up to 256 tokens together, and one where processes share the batches.
        argument: what the caller calls `calibration`, for error messages.

    Raises:
        ValueError: `calibration` has none of these forms, it is empty, a mask does not fit its tokens, or the model
            has no embedding for a token; `batch_size` is less than 1.
    """
    if batch_size is not None:
        check_counts(batch_size=batch_size)
    # Each process needs a batch, and how many there will be is known only when all data is read.
    batch_size = 1 if batch_size is None and place()[1] > 1 else batch_size
    batches = Reader(model, batch_size, argument).read(calibration)
    for batch in batches:
        _check_token_masks(batch, argument)
        _check_attention_masks(batch, argument)
    _check_vocabulary(model, batches, argument)
    return batches


def _check_attention_masks(batch: Mapping[str, Any], argument: str) -> None:
    for side in ("", "decoder_"):
        tokens, mask = batch.get(f"{side}input_ids"), batch.get(f"{side}attention_mask")
        if not isinstance(tokens, Tensor) or not isinstance(mask, Tensor) or (tokens.dim(), mask.dim()) != (2, 2):
            continue
        # A mask is longer where a cache holds tokens before these.
        if mask.shape[0] != tokens.shape[0] or mask.shape[1] < tokens.shape[1]:
            raise ValueError(
                f"Expected `{side}attention_mask` of `{argument}` to have an entry for each token, got shape "
                f"{tuple(mask.shape)} for tokens of shape {tuple(tokens.shape)}. Cut both to the same length."
            )


def _check_vocabulary(model: nn.Module, batches: list[dict[str, Any]], argument: str) -> None:
    """Raise ValueError if a token has no embedding. On a GPU it would end the process.

    Beside images or sound, ids may also stand for places where these are put.
    """
    embedding = _embedding_of_tokens(model)
    if embedding is None:
        return
    extremes: list[Tensor] = []
    for batch in batches:
        ids = batch.get("input_ids")
        if isinstance(ids, Tensor) and ids.dim() == 2 and not any(map(_is_of_numbers, batch.values())):
            extremes += ids.aminmax()
    for token in to_host(extremes):
        if not 0 <= token < embedding.num_embeddings:
            raise ValueError(
                f"Expected token ids of `{argument}` from 0 to {embedding.num_embeddings - 1}, for which "
                f"{type(base_model(model)).__name__} has embeddings, got {token}. Use the tokenizer of this model."
            )


def _embedding_of_tokens(model: nn.Module) -> nn.Embedding | None:
    model = base_model(model)
    # Models without tokens raise this error.
    with contextlib.suppress(NotImplementedError):
        embedding = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
        return embedding if type(embedding) is nn.Embedding else None
    return None


def _is_of_numbers(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _check_token_masks(batch: Mapping[str, Any], argument: str) -> None:
    for name in TOKEN_MASKS:
        mask = batch.get(name)
        if mask is None:
            continue
        side = name.removesuffix("token_mask")
        tokens = next((batch[n] for n in (f"{side}input_ids", f"{side}inputs_embeds") if n in batch), None)
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else None
        expected = tuple(tokens.shape[:2]) if isinstance(tokens, Tensor) else shape
        if shape is None or len(shape) != 2 or shape != expected or not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(
                f"Expected `{name}` of `{argument}` as a tensor (sequences, tokens) of 0 and 1"
                f"{f' of the shape {expected} of the tokens' if expected and len(expected) == 2 else ''}, got "
                f"{type(mask).__name__ if shape is None else f'{mask.dtype} of shape {shape}'}. Write 1 for each "
                "token that counts."
            )


def model_arguments(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a forward pass of `model` on `batch` is called with, which the pass does not write to.

    Token masks are left out. No cache is made. A cache that the batch holds, such as that of a prefix, is copied,
    because the model appends to it.
    """
    given = {name: copied(value) for name, value in batch.items() if name not in TOKEN_MASKS}
    made = without_cache(model)
    return given | ({"use_cache": False} if "use_cache" in given else made)


def copied(value: Any) -> Any:
    """Return a copy of `value` if it is a cache, or holds one or other objects. Tensors are returned as they are."""
    if value is None or isinstance(value, (Tensor, bool, int, float, str)):
        return value
    # Of tensors that a graph has computed, as those of a cache may be, `deepcopy` makes no copies.
    return copy.deepcopy(value, {id(tensor): tensor.detach().clone() for tensor in tensors_in(value)})


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a cache, in the order of its layers, or in lists, tuples, dicts and objects of any kind."""
    seen: set[int] = set()

    def walk(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in seen and not isinstance(value, type):
            seen.add(id(value))
            parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
            for part in (*parts, *getattr(value, "__dict__", {}).values()):
                yield from walk(part)

    return walk(value)


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """Return the tokens of model inputs as their labels, (sequences, tokens).

    Labels are -100 at padding, where a token would be predicted from padding, and at tokens that a token mask leaves
    out. A causal model compares the label of a token with the prediction at the token before, so its labels are its
    tokens. An encoder-decoder compares label and prediction at the same position, so its labels are the decoder's
    tokens, shifted by one position.
    """
    side = "decoder_" if "decoder_input_ids" in batch else ""
    labels = batch[f"{side}input_ids"].long()
    if isinstance(mask := batch.get(f"{side}attention_mask"), Tensor) and mask.shape == labels.shape:
        labels = without_padding(labels, mask)
    labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100) if side else labels
    return counted(labels, batch, shifted=bool(side))


def counted(labels: Tensor, batch: Mapping[str, Any], shifted: bool) -> Tensor:
    """Return `labels` with -100 at tokens that a token mask of `batch` leaves out.

    Args:
        labels: labels of any shape. Those that are not (sequences, tokens) as the mask come back as they are.
        shifted: whether the label at a position is the decoder's next token, as in an encoder-decoder.
    """
    mask = batch.get("decoder_token_mask" if shifted else "token_mask")
    if not isinstance(mask, Tensor) or mask.shape != labels.shape:
        return labels
    mask = nn.functional.pad(mask[:, 1:], (0, 1), value=1) if shifted else mask
    return labels.masked_fill(mask.to(labels.device) == 0, -100)


def without_padding(labels: Tensor, mask: Tensor) -> Tensor:
    """Return `labels` with -100 where `mask` (sequences, tokens) is 0, and where it is 0 at the token before."""
    kept = mask.bool()
    predicted = kept & nn.functional.pad(kept[:, :-1], (1, 0), value=True)
    return labels.masked_fill(~predicted, -100)


def without_cache(model: nn.Module) -> dict[str, Any]:
    """Return the argument that keeps `model` from making a key-value cache, if its forward takes that argument."""
    accepted = inspect.signature(base_model(model).forward).parameters
    return {"use_cache": False} if "use_cache" in accepted else {}


def output_of(outputs: Any, name: str) -> Any:
    """Return what a model returned under `name`, in a dict or as an attribute; None if there is no such output."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def sequences_in(batch: Mapping[str, Any]) -> int:
    """Return the number of sequences in a batch of model inputs: the length of its tokens or its first tensor."""
    # Not accelerate's `find_batch_size`, which refuses inputs whose first value is not a tensor.
    values = (batch.get("input_ids"), *batch.values())
    return next((len(value) for value in values if isinstance(value, Tensor) and value.dim()), 1)


def count_sequences(inputs: list[dict[str, Any]]) -> int:
    """Return how many sequences model inputs hold."""
    return sum(map(sequences_in, inputs))


def in_words(inputs: list[dict[str, Any]]) -> str:
    """Return the amount of data in words. With several processes a hash is added, by which they compare their data."""
    amount = f"{count_sequences(inputs)} sequences in {len(inputs)} batches"
    return amount if place()[1] == 1 else f"{amount}, of hash {fingerprint_of_inputs(inputs)}"


def fingerprint_of_inputs(inputs: Iterable[Mapping[str, Any]]) -> str:
    """Return a hash of model inputs."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in inputs:
        for name, value in sorted(batch.items()):
            tensors = list(tensors_in(value))
            for tensor in tensors:
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            if not tensors:
                digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()
