"""One protocol for the perplexity of a text, and what identifies a result of it."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..calibration.sources import texts_of
from ..calibration.text import pack_sequences
from .perplexity import exponential, mean_loss


SEPARATOR = "\n\n"
WINDOW = 2048


@dataclass(frozen=True)
class TextPerplexity:
    """The perplexity of a model on a text, with everything that it depends on.

    Args:
        perplexity: exp of the mean cross entropy of the tokens that are counted.
        tokens: how many tokens were counted: `windows` * (`window` - 1).
        windows: how many windows were measured.
        window: tokens of a window.
        text_digest: the start of the SHA-256 hash of the joined text.
        token_digest: the same of the token ids of the windows. Two models with this digest in common were measured on
            the same tokens.
    """

    perplexity: float
    tokens: int
    windows: int
    window: int
    text_digest: str
    token_digest: str

    @property
    def protocol(self) -> str:
        """What was measured, in one sentence that another tool can follow."""
        return (
            f"documents joined by {SEPARATOR!r} and tokenised in one piece with the tokenizer's default special "
            f"tokens; windows of {self.window} tokens, stride {self.window} (no overlap), a last window that is not "
            "full is dropped; all tokens of a window except its first are counted; exp of the mean over all of them"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values for JSON."""
        return {**asdict(self), "protocol": self.protocol}


def text_perplexity(
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[Any],
    *,
    window: int = WINDOW,
    max_windows: int | None = None,
    batch_size: int = 1,
) -> TextPerplexity:
    r"""Return the perplexity of a causal language model on a text, by the one protocol of the pruning papers.

    The documents are joined by "\n\n" and tokenised in one piece, with the special tokens that the tokenizer adds by
    default. The tokens are cut into windows that do not overlap, and a last window that is not full is dropped. In
    each window the model predicts every token except the first. The perplexity is exp of the mean cross entropy over
    all predicted tokens. It equals `perplexity(model, pack_sequences(documents, tokenizer, window))`.

    SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774), Wanda and PERP measure so on the test split of WikiText-2,
    with windows of 2,048 tokens (Wanda: as many as the model takes). Perplexities of different windows or tokenizers
    cannot be compared. The result says them.

    Args:
        model: a causal language model.
        tokenizer: a tokenizer of transformers.
        documents: texts, in the order in which they are joined; or a `datasets.Dataset` with a column "text"; or one
            text.
        window: tokens of a window.
        max_windows: measure only so many windows, from the beginning of the text. By default all of them.
        batch_size: how many windows run together.

    Raises:
        TypeError: `documents` holds something else than texts.
        ValueError: the text has fewer than `window` tokens; `window` is below 2, or more than the model reads at once;
            `max_windows` is below 1; see also `perplexity`.
    """
    check_window(model, window)
    texts = list(texts_of(documents))
    windows = windows_of(texts, tokenizer, window, max_windows)
    loss, count = mean_loss(model, windows, batch_size, "documents")
    return described(loss, count, windows, texts)


def windows_of(texts: list[str], tokenizer: Any, window: int, max_windows: int | None) -> Tensor:
    """Return the windows of `text_perplexity`, token ids (windows, tokens).

    Raises:
        ValueError: see `text_perplexity`.
    """
    if max_windows is not None and (not isinstance(max_windows, int) or max_windows < 1):
        raise ValueError(f"Expected `max_windows` of 1 or more, or None for the whole text, got {max_windows!r}.")
    if not isinstance(window, int) or window < 2:
        raise ValueError(
            f"Expected `window` of 2 or more, got {window!r}. A model predicts every token but the first."
        )
    try:
        return pack_sequences(texts, tokenizer, window, separator=SEPARATOR)[:max_windows]
    except ValueError as error:
        raise ValueError(f"The text is too short for one `window` of {window} tokens. Lower `window`.") from error


def check_window(model: Any, window: int) -> None:
    """Check that a model was made for windows of this length.

    Raises:
        ValueError: it reads fewer tokens at once.
    """
    most = positions_of(model)
    if most is not None and most < window:
        raise ValueError(
            f"The model reads at most {most} tokens at once, got `window={window}`. Use a window of {most}."
        )


def positions_of(model: Any) -> int | None:
    """Return how many tokens a model was made to read at once, or None if its configuration does not say."""
    config = getattr(model, "config", None)
    most = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    return most if isinstance(most, int) and most > 0 else None


def described(loss: float, count: int, windows: Tensor, texts: list[str]) -> TextPerplexity:
    """Return the result for a mean loss over `count` tokens."""
    return TextPerplexity(
        exponential(loss),
        count,
        windows.shape[0],
        windows.shape[1],
        _digest(SEPARATOR.join(texts).encode()),
        _digest(windows.numpy().tobytes()),
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def metric_path(name: str = "perplexity") -> str:
    """Return the folder from which `evaluate.load` loads a metric of this package.

    `evaluate.load(metric_path("perplexity"))` needs no network. The metric measures as `text_perplexity` does.

    Args:
        name: the name of the metric. There is one: "perplexity".

    Raises:
        ValueError: there is no metric of that name.
    """
    folder = Path(__file__).parent / "metrics"
    if name not in (known := sorted(path.parent.name for path in folder.glob("*/*.py"))):
        raise ValueError(f"Expected the name of a metric of peft_sparse, one of {', '.join(known)}, got {name!r}.")
    return str(folder / name)
