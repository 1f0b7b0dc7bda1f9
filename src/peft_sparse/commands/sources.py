"""The model and the text of a command: read from a folder, a file, or the Hub."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .outcome import BadArguments


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
    evaluation_sequences: int = field(default=8, metadata={"help": "Number of sequences for perplexity."})


def load_documents(sources: SourceArguments) -> tuple[list[str], list[str], str]:
    """Return the training documents, the evaluation documents and the name of the text.

    Raises:
        BadArguments: no text is given.
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
    else:
        raise BadArguments("A text is needed to measure the model. Give --text_file FILE, or --dataset_name NAME.")
    return [text for i, text in enumerate(documents) if i % 10], documents[::10], name


def load_model(sources: SourceArguments) -> tuple[Any, Any]:
    """Return the causal language model and its tokenizer.

    Raises:
        BadArguments: no model is given.
        OSError: there is no such model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = sources.model_name_or_path
    if source is None:
        raise BadArguments("A model is needed. Give --model FOLDER, or its name on the Hub.")
    return AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
