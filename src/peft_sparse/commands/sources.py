"""The model and the text of a command: read from a folder, a file, or the Hub, or the embedded default."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..calibration.text import pack_sequences
from ..recipes import TextArguments
from ..training.arguments import SparseTrainingArguments
from . import demonstration
from .outcome import BadArguments
from .story import say


@dataclass
class SourceArguments:
    """The model and the text."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder of the model, or its name on the Hub.", "aliases": ["--model"]}
    )
    text_file: str | None = field(
        default=None, metadata={"help": "Plain text file. Every tenth paragraph is held out for evaluation."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Name of a data set on the Hub that has a column of text."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_split: str = field(
        default="train", metadata={"help": "Split of the data set. Every tenth document is held out for evaluation."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the data set that holds the text."})
    max_documents: int = field(
        default=20_000, metadata={"help": "Largest number of documents to read from the data set."}
    )
    evaluation_sequences: int = field(
        default=8, metadata={"help": "Number of held-out sequences that perplexity is measured on."}
    )
    evaluation_length: int = field(default=512, metadata={"help": "Tokens in a sequence of the evaluation."})

    def __post_init__(self) -> None:
        for name, least in (("evaluation_sequences", 1), ("evaluation_length", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")

    @property
    def has_text(self) -> bool:
        """Whether a text is given."""
        return self.text_file is not None or self.dataset_name is not None


# Names of fields, as groups of the help.
MODEL = ("model_name_or_path",)
TEXT = ("text_file", "dataset_name", "dataset_config", "dataset_split", "text_column", "max_documents")
EVALUATION = ("evaluation_sequences", "evaluation_length")


@dataclass
class Documents:
    """What is read: texts to work on, and held-out texts to measure.

    Args:
        train: the documents that pruning, reconstruction and retraining may read.
        evaluation: documents that only evaluation reads.
        name: what reports call the text.
    """

    train: list[str]
    evaluation: list[str]
    name: str


def load_documents(sources: SourceArguments) -> Documents:
    """Return the documents of `sources`. Without a model and a text, these are the documentation of Python.

    Raises:
        BadArguments: a model is given and no text.
        OSError: there is no such file or data set.
    """
    if sources.dataset_name is not None:
        from datasets import load_dataset

        stream = load_dataset(
            sources.dataset_name, sources.dataset_config, split=sources.dataset_split, streaming=True
        )
        documents = [row[sources.text_column] for row in stream.take(sources.max_documents)]
        name = sources.dataset_name
    elif sources.text_file is not None:
        documents = Path(sources.text_file).read_text(encoding="utf-8").split("\n\n")
        name = Path(sources.text_file).name
    elif sources.model_name_or_path is None:
        return Documents(*demonstration.python_documents(), demonstration.TEXT)
    else:
        raise BadArguments("A text is needed. Give --text_file FILE, or --dataset_name with a data set on the Hub.")
    return Documents([text for i, text in enumerate(documents) if i % 10], documents[::10], name)


def model_source(sources: SourceArguments) -> str:
    """Return the folder or the name of the model. Without one this is the folder of the embedded model."""
    return sources.model_name_or_path or str(demonstration.smollm2_dir())


def own_model(sources: SourceArguments) -> str:
    """Return the folder or the name of the model, which must be given.

    Raises:
        BadArguments: it is not.
    """
    if sources.model_name_or_path is None:
        raise BadArguments("A model is needed. Give --model with its folder, or its name on the Hub.")
    return sources.model_name_or_path


def load_tokenizer(source: str) -> Any:
    """Return the tokenizer of a model.

    Args:
        source: a folder, or a name on the Hub.

    Raises:
        OSError: there is no such model.
    """
    _check_folder(source)
    return AutoTokenizer.from_pretrained(source)


def load_model(source: str) -> tuple[Any, Any]:
    """Return a causal language model and its tokenizer.

    Args:
        source: a folder, or a name on the Hub.

    Raises:
        OSError: there is no such model.
    """
    tokenizer = load_tokenizer(source)
    return AutoModelForCausalLM.from_pretrained(source), tokenizer


def in_turn(read: Callable[[], Any]) -> Any:
    """Call `read` in the main process first. It may download, and the other processes then read its cache.

    If it raises an error, the other processes call it as well, and meet the same error.
    """
    state = PartialState()
    if not state.is_main_process:
        state.wait_for_everyone()
    try:
        return read()
    finally:
        if state.is_main_process:
            state.wait_for_everyone()


def shuffled(sequences: Tensor, seed: int) -> Tensor:
    """Return the sequences in random order, so that the first of them come from all of the text."""
    return sequences[torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))]


def calibration_sequences(
    documents: Documents, tokenizer: Any, text: TextArguments, options: SparseTrainingArguments
) -> Tensor:
    """Return `calibration_samples` sequences of the text, drawn at random, (sequences, tokens)."""
    sequences = pack_sequences(documents.train, tokenizer, text.calibration_length)
    return shuffled(sequences, options.seed)[: options.calibration_samples]


def load_all(sources: SourceArguments) -> tuple[Documents, Any, Any]:
    """Return the documents, the model and its tokenizer. Without a model, these are the embedded default."""
    say("reading the text and the model")
    documents = in_turn(lambda: load_documents(sources))
    return documents, *load_model(in_turn(lambda: model_source(sources)))


def held_out(documents: Documents, tokenizer: Any, sources: SourceArguments) -> Tensor:
    """Return the sequences on which perplexity is measured, (sequences, tokens)."""
    sequences = pack_sequences(documents.evaluation, tokenizer, sources.evaluation_length)
    return sequences[: sources.evaluation_sequences]


def tell_text(documents: Documents, train: Tensor, evaluation: Tensor) -> None:
    """Say how much of which text a training reads, and how much is held out."""
    say(f"text: {documents.name}; {train.numel():,} tokens to train on, {evaluation.numel():,} others to measure")


def tell_model(sources: SourceArguments, model: Any, device: Any) -> None:
    """Say which model is worked on, and where."""
    name = sources.model_name_or_path or f"{demonstration.MODEL}, from PyPI"
    count = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    say(f"model: {name}, {count / 1e6:,.1f} million parameters in {dtype}, on {device}")


def _check_folder(source: str) -> None:
    """Refuse what is neither a folder nor can be a name on the Hub. Its loader would speak of a `repo_id`."""
    if not Path(source).is_dir() and (source.count("/") > 1 or source.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"There is no folder {source!r}. Give a folder of a model, or its name on the Hub.")
