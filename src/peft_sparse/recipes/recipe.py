"""A recipe: the arguments of every stage of a compression, read from a YAML file."""

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig

from ..training.arguments import SparseTrainingArguments
from ..tuners import MaskLoRAConfig, ScaledLoRAConfig


_FOLDER = Path(__file__).parent
# The recipes of the package, from the fastest to the best.
RECIPES = ("fast", "balanced", "best")
# The numerator of the scaling with which the recipes were measured.
MASK_LORA_ALPHA = 32
ADAPTERS: dict[str, type[PeftConfig]] = {"mask_lora": MaskLoRAConfig, "scaled_lora": ScaledLoRAConfig}


@dataclass
class TextArguments:
    """How much text a recipe uses."""

    sequence_length: int = field(default=256, metadata={"help": "Tokens in a sequence of retraining."})
    calibration_length: int = field(
        default=128, metadata={"help": "Tokens in a sequence of calibration and reconstruction."}
    )

    def __post_init__(self) -> None:
        for name in ("sequence_length", "calibration_length"):
            if getattr(self, name) < 2:
                raise ValueError(
                    f"`{name}` must be at least 2, got {getattr(self, name)}. A model predicts every token but the "
                    "first."
                )


@dataclass
class AdapterArguments:
    """The adapter that is retrained, with the names of its configuration."""

    adapter: str = field(
        default="mask_lora",
        metadata={"help": f"What is retrained: {', '.join(ADAPTERS)}, or none for all weights."},
    )
    r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "The scaling is lora_alpha / r. Default: 32 for mask_lora. scaled_lora then scales by 1."},
    )
    train_norms: bool = field(default=True, metadata={"help": "Train the normalisation layers as well."})
    bias: str = field(default="all", metadata={"help": 'Biases to train: "none" or "all".'})

    def __post_init__(self) -> None:
        if self.adapter not in (*ADAPTERS, "none"):
            raise ValueError(
                f"`adapter` must be one of {', '.join(map(repr, (*ADAPTERS, 'none')))}, got {self.adapter!r}."
            )

    def config(self, task_type: str | None = None) -> PeftConfig | None:
        """Return the configuration of the adapter for all linear layers of the blocks. None trains all weights."""
        if self.adapter == "none":
            return None
        lora_alpha = MASK_LORA_ALPHA if self.lora_alpha is None and self.adapter == "mask_lora" else self.lora_alpha
        return ADAPTERS[self.adapter](
            task_type=task_type,
            target_modules="all-linear",
            r=self.r,
            lora_alpha=lora_alpha,
            train_norms=self.train_norms,
            bias=self.bias,
        )


@dataclass
class Recipe:
    """What `compress` does, and with which numbers.

    Args:
        name: the name of the recipe, or the path of its file.
        args: how the model is pruned, reconstructed and retrained. `args.recovery` names the stages.
        adapter: what is retrained.
        text: how much text is used.
    """

    name: str
    args: SparseTrainingArguments
    adapter: AdapterArguments = field(default_factory=AdapterArguments)
    text: TextArguments = field(default_factory=TextArguments)


# The classes whose fields a recipe may set. Each field has one meaning in all of them.
PARTS: tuple[Any, ...] = (TextArguments, AdapterArguments, SparseTrainingArguments)


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """Return the values of a recipe, by the name of the argument.

    Args:
        recipe: "fast", "balanced" or "best", or the path of a YAML file with names of arguments and values.

    Raises:
        ValueError: there is no such recipe; the file holds something else, or an unknown name.
    """
    path = _FOLDER / f"{recipe}.yaml" if recipe in RECIPES else Path(recipe)
    if not path.is_file():
        raise ValueError(
            f"Expected a recipe: {', '.join(map(repr, RECIPES))}, or the path of a YAML file; got {str(recipe)!r}."
        )
    values = read_values(path)
    _check_names(values)
    return values


class _Loader(yaml.SafeLoader):
    """Reads numbers as Python writes them: YAML 1.1 would read 2:4 as 124, and 1e-3 as a text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] not in ("int", "float")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.\d*|\.?\d+)([eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)


def read_values(path: str | Path) -> dict[Any, Any]:
    """Return the names and values in a YAML file.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not YAML, or holds something else than names and values.
    """
    try:
        # A subclass of the loader of `safe_load`.
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # noqa: S506
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        words = " ".join(str(error).split())
        raise ValueError(
            f"Expected {str(path)!r} to be YAML with names and values, such as `criterion: wanda`. {words}."
        ) from error
    if not isinstance(values, dict):
        raise ValueError(
            f"Expected {str(path)!r} to hold names and values, such as `criterion: wanda`, got "
            f"{type(values).__name__}."
        )
    return values


def load_recipe(recipe: str | Path, output_dir: str | Path, **changes: Any) -> Recipe:
    """Return a recipe of the package or of a file, with some of its values changed.

    Args:
        recipe: "fast" (prunes and trains nothing), "balanced" or "best"; or the path of a YAML file that gives
            arguments of `SparseTrainingArguments`, `AdapterArguments` and `TextArguments` by name.
        output_dir: the folder to which the run writes.
        changes: arguments of the same classes. They replace those of the recipe. `sparsity` replaces `pattern`, and
            `pattern` replaces `sparsity`.

    Raises:
        ValueError: there is no such recipe; a name or a value is unknown.
    """
    values = read_recipe(recipe)
    _check_names(changes)
    if {"sparsity", "pattern"} & changes.keys():
        values = {name: value for name, value in values.items() if name not in ("sparsity", "pattern")}
    values |= {"output_dir": str(output_dir)} | changes
    parts = [kind(**{name: values[name] for name in values if name in _names(kind)}) for kind in PARTS]
    text, adapter, args = parts
    return Recipe(str(recipe), args, adapter, text)


def _names(kind: Any) -> set[str]:
    return {each.name for each in dataclasses.fields(kind) if each.init}


def _check_names(values: dict[str, Any]) -> None:
    known = set().union(*map(_names, PARTS))
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(
                f"A recipe has no argument {name!r}. {f'Did you mean {near[0]!r}? ' if near else ''}It takes those of "
                "SparseTrainingArguments, of the adapter (adapter, r, lora_alpha, train_norms, bias) and of the text "
                "(sequence_length, calibration_length)."
            )
