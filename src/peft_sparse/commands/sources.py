"""The model and the text of a command: read from a folder, a file, or the Hub, or the embedded default."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.peft_utils import find_adapter_config_file

from ..calibration.text import pack_sequences
from ..evaluation.loading import check_causal
from ..evaluation.protocol import positions_of
from ..recipes import TextArguments
from ..training.arguments import SparseTrainingArguments
from . import demonstration
from .outcome import BadArguments
from .story import say
from .text_files import paragraphs, read_documents


@dataclass
class SourceArguments:
    """The model and the text."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder of the model, or its name on the Hub.", "aliases": ["--model"]}
    )
    text_file: str | None = field(
        default=None,
        metadata={
            "help": "Plain text, or JSON lines (.jsonl, .json). Also .gz. Every tenth paragraph or row is held out "
            "for evaluation."
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Name of a data set on the Hub that has a column of text."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_split: str = field(
        default="train", metadata={"help": "Split of the data set. Every tenth document is held out for evaluation."}
    )
    text_column: str = field(
        default="text", metadata={"help": "Column of the data set, or name in JSON lines, of the text."}
    )
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
        BadArguments: a model is given and no text, or a row has no text.
        OSError: there is no such file or data set.
        ValueError: the file is not UTF-8, or holds no text.
    """
    if sources.dataset_name is not None:
        from datasets import load_dataset

        stream = load_dataset(
            sources.dataset_name, sources.dataset_config, split=sources.dataset_split, streaming=True
        )
        rows = list(stream.take(sources.max_documents))
        if rows and sources.text_column not in rows[0]:
            raise BadArguments(
                f"The data set {sources.dataset_name!r} has no column {sources.text_column!r}. Give --text_column "
                f"with one of {', '.join(map(repr, rows[0]))}."
            )
        documents = [row[sources.text_column] for row in rows]
        name = sources.dataset_name
    elif sources.text_file is not None:
        documents = read_documents(sources.text_file, sources.text_column)
        documents = paragraphs(documents[0]) if len(documents) == 1 else documents
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


def configuration(source: str) -> Any:
    """Return the configuration of a model.

    Args:
        source: a folder, or a name on the Hub.

    Raises:
        OSError: there is no such model.
        ValueError: it is an adapter.
    """
    check_source(source)
    try:
        return AutoConfig.from_pretrained(source)
    except OSError as error:
        raise OSError(f"There is no folder {source!r}, and no model of this name could be loaded. {error}") from error


def load_tokenizer(source: str) -> Any:
    """Return the tokenizer of a model.

    Args:
        source: a folder, or a name on the Hub.

    Raises:
        OSError: there is no such model, or it has no tokenizer.
        ValueError: it is an adapter.
    """
    check_source(source)
    if Path(source).is_dir() and not any(Path(source).glob("*token*")):
        raise FileNotFoundError(
            f"{source!r} holds no tokenizer. Save that of the dense model there: "
            f"`AutoTokenizer.from_pretrained(DENSE).save_pretrained({source!r})`."
        )
    return AutoTokenizer.from_pretrained(source)


def load_model(source: str) -> tuple[Any, Any]:
    """Return a causal language model and its tokenizer.

    Args:
        source: a folder, or a name on the Hub.

    Raises:
        OSError: there is no such model, or it has no tokenizer.
        ValueError: it is an adapter or another kind of model, or lacks weights.
    """
    check_causal(source, configuration(source))
    tokenizer = load_tokenizer(source)
    model, found = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    if found["missing_keys"]:
        first = min(found["missing_keys"])
        raise ValueError(
            f"{source!r} lacks {len(found['missing_keys'])} tensors of {type(model).__name__} (first {first!r}), "
            "which would be random. Give a causal language model with its head."
        )
    return model, tokenizer


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


def packed(texts: list[str], tokenizer: Any, length: int, argument: str, what: str) -> Tensor:
    """Return the sequences of texts, (sequences, tokens).

    Args:
        texts: the texts.
        tokenizer: the tokenizer.
        length: tokens in a sequence.
        argument: the argument that gives `length`.
        what: what the texts are, for the error.

    Raises:
        ValueError: they have fewer than `length` tokens.
    """
    try:
        return pack_sequences(texts, tokenizer, length)
    except ValueError as error:
        raise ValueError(
            f"{what} has fewer tokens than one sequence of --{argument} {length}. Give a longer text, with empty "
            f"lines between its paragraphs, or lower --{argument}."
        ) from error


def check_lengths(model: Any, **lengths: int) -> None:
    """Check that a model takes sequences of all `lengths`, in tokens, by the name of the argument.

    Raises:
        ValueError: it was made for shorter ones.
    """
    most = positions_of(model)
    longer = {name: length for name, length in lengths.items() if most is not None and most < length}
    if longer:
        got = ", ".join(f"--{name} {length}" for name, length in longer.items())
        instead = " ".join(f"--{name} {most}" for name in longer)
        raise ValueError(f"The model reads at most {most} tokens at once, got {got}. Give {instead}.")


def calibration_sequences(
    documents: Documents, tokenizer: Any, text: TextArguments, options: SparseTrainingArguments
) -> Tensor:
    """Return `calibration_samples` sequences of the text, drawn at random, (sequences, tokens)."""
    sequences = packed_for(documents, tokenizer, text, "calibration_length")
    return shuffled(sequences, options.seed)[: options.calibration_samples]


def packed_for(documents: Documents, tokenizer: Any, text: TextArguments, argument: str) -> Tensor:
    """Return the sequences that are not held out, of the length that the field `argument` of `text` gives."""
    what = f"What is not held out of {documents.name!r}"
    return packed(documents.train, tokenizer, getattr(text, argument), argument, what)


def load_all(sources: SourceArguments) -> tuple[Documents, Any, Any]:
    """Return the documents, the model and its tokenizer. Without a model, these are the embedded default."""
    say("reading the text and the model")
    documents = in_turn(lambda: load_documents(sources))
    return documents, *load_model(in_turn(lambda: model_source(sources)))


def held_out(documents: Documents, tokenizer: Any, sources: SourceArguments) -> Tensor:
    """Return the sequences on which perplexity is measured, (sequences, tokens)."""
    what = f"The held-out tenth of {documents.name!r}"
    sequences = packed(documents.evaluation, tokenizer, sources.evaluation_length, "evaluation_length", what)
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


def check_source(source: str) -> None:
    """Check that `source` can be a model: a folder that holds one, or a name on the Hub.

    Raises:
        OSError: it is a file, or a folder without a model; or there is no such folder, and it is no name on the Hub.
        ValueError: it holds an adapter.
    """
    folder = Path(source)
    if folder.is_file():
        raise NotADirectoryError(f"Expected the folder of a model, got the file {source!r}. Give its folder.")
    if not folder.is_dir() and (source.count("/") > 1 or source.startswith((".", "/", "~"))):
        # Its loader would speak of a `repo_id`.
        raise FileNotFoundError(f"There is no folder {source!r}. Give a folder of a model, or its name on the Hub.")
    if find_adapter_config_file(source) is not None:
        raise ValueError(
            f"{source!r} is an adapter. Merge it first: `peft-sparse merge {source} --output_dir merged`. Then give "
            "the merged model."
        )
    if folder.is_dir() and not (folder / "config.json").exists():
        inside = [path.parent for path in sorted(folder.glob("*/config.json"))]
        near = f", such as {str(inside[-1])!r}" if inside else ""
        raise FileNotFoundError(
            f"{source!r} holds no model: there is no config.json. Give a folder that `save_pretrained` wrote{near}."
        )


def check_output(output_dir: str, *results: str, source: str | None = None) -> None:
    """Check that results can be written, before anything is computed.

    Args:
        output_dir: the folder to write to.
        results: the folders of models in it.
        source: the model that is read.

    Raises:
        OSError: the folder is a file, or cannot be written to.
        ValueError: a result would overwrite the model.
    """
    output = Path(output_dir).absolute()
    for result in results:
        there = next(path for path in (output / result, *(output / result).parents) if path.exists())
        if not there.is_dir():
            raise NotADirectoryError(
                f"Expected a folder to write to, and {str(there)!r} is a file. Give another --output_dir."
            )
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(f"Nothing can be written to {str(there)!r}. Give another --output_dir.")
        if source is not None and Path(source).is_dir() and Path(source).resolve() == (output / result).resolve():
            raise ValueError(
                f"The result would overwrite {source!r}, from which it is made. Give another --output_dir."
            )
