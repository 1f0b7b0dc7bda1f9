"""The files of a checkpoint: which hold its weights, and which others go with them."""

import fnmatch
import json
from collections.abc import Iterable
from pathlib import Path

import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


# What goes with the weights of a model. Other files may hold dense weights in another format.
_CONFIGURATION = (
    "config.json",
    "configuration.json",
    "generation_config.json",
    "*processor_config.json",
    "*processor.json",
    "feature_extractor*.json",
)
_TOKENIZER = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "vocab.bpe",
    "bpe.codes",
    "dict.txt",
    "merges*.txt",
    "normalizer.json",
    "tekken.json",
    "*.tiktoken",
    "*.spm",
    "spiece.model",
    "sentencepiece*.model",
    "tokenizer*.model",
    "tokenizer.model.v*",
    "spm*.model",
)
_CHAT = ("chat_template*.json", "chat_template*.jinja", "additional_chat_templates/*.jinja")
_TEXTS = ("readme*", "licen[cs]e*", "notice*", "copying*", "use_policy*")
_TEXT_SUFFIXES = ("", ".md", ".txt", ".rst", ".pdf")
_CODE = ("*.py", "custom_generate/*.py", "custom_generate/requirements.txt", "requirements.txt")


def weight_files(source: Path, config: PretrainedConfig) -> list[Path]:
    """Return the safetensors files that `from_pretrained` reads in `source`, after their index if there is one.

    Raises:
        ValueError: there is no safetensors file that `config` names, or that has the usual name; the index cannot be
            read, or names a file that is not there.
    """
    named = getattr(config, "transformers_weights", None)
    names = [named] if named else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    found = [source / name for name in names if (source / name).is_file()]
    if not found:
        if named:
            raise ValueError(
                f"config.json in {str(source)!r} says where the weights are: {named!r}. There is no such file. Give a "
                "folder that `save_pretrained` wrote."
            )
        raise ValueError(
            f"Expected {' or '.join(names)} in {str(source)!r}, found neither. Give a folder that `save_pretrained` "
            "wrote."
        )
    files = [found[0]]
    if found[0].suffix == ".json":
        files += [source / name for name in files_of_index(found[0])]
    extra = [source / name for name in getattr(type(config), "extra_files", ())]
    return files + [path for path in extra if path.is_file() and path not in files]


def files_of_index(index: Path, there: bool = True) -> list[str]:
    """Return the names of the files that an index of a checkpoint names.

    Args:
        index: the file of the index.
        there: whether to check that they lie beside it.

    Raises:
        ValueError: it is no index, or a file is not there.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(index)!r} is no index of a checkpoint, a JSON file with a `weight_map`: {type(error).__name__}: "
            f"{error}. Download it again."
        ) from error
    for name in names if there else ():
        if not (index.parent / name).is_file():
            raise ValueError(f"{str(index)!r} names {name!r}, which is not there. Download it again.")
    return names


def described(files: list[Path]) -> tuple[dict[str, Tensor], dict[str, Path]]:
    """Return the tensors in `files` on the meta device by name, and the file of each.

    Raises:
        ValueError: a file is broken.
    """
    tensors: dict[str, Tensor] = {}
    places: dict[str, Path] = {}
    for path in files:
        if path.suffix == ".json":
            continue
        try:
            found = load_state_dict(str(path), map_location="meta")
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is no whole safetensors file: {error}. Download it again.") from error
        tensors |= found
        places |= dict.fromkeys(found, path)
    return tensors, places


def files_beside(source: Path) -> tuple[list[str], list[str]]:
    """Return the files in `source` that go with its weights, and those that are not known to, by relative name."""
    names = sorted(
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(source).parts)
    )
    patterns = (*_CONFIGURATION, *_TOKENIZER, *_CHAT, *_vocabularies(source), *(_CODE if _has_code(source) else ()))
    known = [name for name in names if _matches(name, patterns) or _is_text(name)]
    return known, [name for name in names if name not in known]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    # In these patterns, * does not stand for folders.
    return any(
        name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name.lower(), pattern.lower())
        for pattern in patterns
    )


def _is_text(name: str) -> bool:
    return _matches(name, _TEXTS) and Path(name).suffix.lower() in _TEXT_SUFFIXES


def _settings(source: Path) -> list[dict[str, object]]:
    paths = [path for path in source.glob("*config.json") if path.is_file()]
    found = [json.loads(path.read_text()) for path in paths]
    return [settings for settings in found if isinstance(settings, dict)]


def _has_code(source: Path) -> bool:
    return any("auto_map" in settings for settings in _settings(source)) or (source / "custom_generate").is_dir()


def _vocabularies(source: Path) -> list[str]:
    """Return the names of the files that the tokenizer's class reads."""
    classes = [getattr(transformers, str(settings.get("tokenizer_class")), None) for settings in _settings(source)]
    return [name for cls in classes for name in getattr(cls, "vocab_files_names", {}).values()]
