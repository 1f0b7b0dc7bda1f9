"""Zero-shot accuracy by lm-eval, for any model that is in memory."""

import copy
import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..calibration.inputs import evaluation_mode
from .extras import extra
from .tables import markdown
from .task_rows import PERP, rows_of


# What lm-eval says of every model that is given as an object, of rows that come from files, and of its own tasks.
KNOWN = (
    "`pretrained` model kwarg is not of type",
    "Passed an already-initialized model",
    "Custom kwargs can be",
    "is defined, but aggregation is not",
    "is defined, but higher_is_better is not",
)


@dataclass(frozen=True)
class TaskScore:
    """The result of a task.

    Args:
        accuracy: the fraction of rows whose right answer is the most likely one, lm-eval's `acc`.
        standard_error: the standard error of `accuracy`, by lm-eval.
        rows: how many rows were evaluated.
        total: how many rows the task has.
        version: the version that lm-eval gives the task.
        others: every other number of lm-eval for this task, such as `acc_norm`, by its name.
    """

    accuracy: float
    standard_error: float
    rows: int
    total: int
    version: str
    others: dict[str, float]


@dataclass(frozen=True)
class TaskReport:
    """Zero-shot accuracies of a model. `str()` is a table in Markdown, in percent.

    Args:
        scores: the result of each task, by lm-eval's name of the task.
        seed: the seed by which rows were drawn. None if all rows were evaluated.
        lm_eval: the version of lm-eval.
    """

    scores: dict[str, TaskScore]
    seed: int | None
    lm_eval: str

    @property
    def mean(self) -> float:
        """The mean of the accuracies. Every task counts the same, as in PERP."""
        return sum(score.accuracy for score in self.scores.values()) / len(self.scores)

    @property
    def mean_error(self) -> float:
        """The standard error of the mean: sqrt(sum of the squared standard errors) / number of tasks."""
        return math.sqrt(sum(score.standard_error**2 for score in self.scores.values())) / len(self.scores)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        return {
            "metric": "acc",
            "num_fewshot": 0,
            "lm_eval": self.lm_eval,
            "seed": self.seed,
            "mean": self.mean,
            "mean_standard_error": self.mean_error,
            "tasks": {name: vars(score) for name, score in self.scores.items()},
        }

    def __str__(self) -> str:
        body = [
            [title_of(name), str(score.rows), percent(score.accuracy, score.standard_error)]
            for name, score in self.scores.items()
        ]
        return markdown(["task", "rows", "acc"], [*body, ["mean", "", percent(self.mean, self.mean_error)]])


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Sequence[str] = "perp",
    *,
    limit: int | None = None,
    seed: int = 0,
    data_dir: str | Path | None = None,
    batch_size: int = 1,
) -> TaskReport:
    """Return the zero-shot accuracies of a model on tasks of lm-eval.

    lm-eval (the package `lm_eval`, in the extra `evaluation`) makes the prompts, scores the answers and computes the
    standard errors. "perp" names the seven tasks of Wanda (Sun et al. 2023, arXiv:2306.11695) and PERP (Zimmer et al.
    2023, arXiv:2312.15230): BoolQ, RTE, HellaSwag, WinoGrande, ARC-easy, ARC-challenge and OpenBookQA. Both papers
    report lm-eval's metric `acc`, not `acc_norm`, without examples in the prompt, and the mean of the seven.

    The model is an object, so that it may be anything: a plain model, a `PeftModel` with an adapter of this package
    or of PEFT, a packed or a compact model. It stays on its device and is not changed.

    Args:
        model: a causal language model.
        tokenizer: a tokenizer of transformers.
        tasks: "perp", or the name of a task of lm-eval, or several names. Each task must have the metric `acc`.
        limit: evaluate at most so many rows of each task, drawn at random. By default all rows are evaluated.
        seed: seed of the random choice of rows. The state of Python's random generator is neither read nor changed.
        data_dir: a folder with the rows of the seven tasks, for machines without network: one file for each task,
            `boolq-validation.jsonl`, `rte-validation.jsonl`, `hellaswag-validation.jsonl`,
            `winogrande_xl-validation.jsonl`, `arc_easy-test.jsonl`, `arc_challenge-test.jsonl` and
            `openbookqa-test.jsonl`, or the same with `.gz`. Each line is a row with the fields of the Hub's data set.
            By default lm-eval loads the data from the Hub, or from the cache.
        batch_size: how many prompts run together.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: a task is unknown, is named twice or has no accuracy; `limit` is below 1; `data_dir` holds no rows
            of a task, or has no format for it; the model is no causal language model.
        FileNotFoundError: a file is missing in `data_dir`.
    """
    names, rows = check_tasks(tasks, limit, data_dir)
    if not hasattr(model, "generate"):
        raise ValueError(
            f"lm-eval needs a causal language model of transformers, got {type(model).__name__}. Give a model that "
            "`AutoModelForCausalLM` loads, with or without an adapter."
        )
    evaluator, language_model = extra("lm_eval.evaluator"), extra("lm_eval.models.huggingface")
    with _undisturbed():
        # Rows of files are drawn first: lm-eval would prepare all of them several times.
        loaded = _loaded(names, {name: _drawn(found, limit, seed) for name, found in rows.items()})
        docs = {name: task.eval_docs for name, task in loaded["tasks"].items()}
        chosen = {name: _drawn(range(len(found)), limit, seed) for name, found in docs.items()}
        with evaluation_mode(model):
            # lm-eval gives the tokenizer a padding token.
            wrapped = language_model.HFLM(
                pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size
            )
            found = evaluator.evaluate(lm=wrapped, task_dict=loaded, samples=chosen, log_samples=False)
    scores = {}
    for name, drawn in chosen.items():
        total = len(rows.get(name, docs[name]))
        scores[name] = _score(found["results"][name], len(drawn), total, str(found["versions"].get(name)))
    partial = any(score.rows < score.total for score in scores.values())
    return TaskReport(scores, seed if partial else None, extra("lm_eval").__version__)


def check_tasks(
    tasks: str | Sequence[str], limit: int | None, data_dir: str | Path | None
) -> tuple[list[str], dict[str, list[dict[str, Any]]]]:
    """Return the names of the tasks that are meant, and their rows if they come from files.

    Raises:
        ImportError, ValueError, FileNotFoundError: see `evaluate_tasks`.
    """
    given = [tasks] if isinstance(tasks, str) else list(tasks)
    names = [name for entry in given for name in (PERP if entry == "perp" else [entry])]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"Expected `tasks` as names of tasks, each once, got {', '.join(map(repr, given)) or 'none'}. Write "
            '"perp" for the seven tasks of the papers, or names that lm-eval knows.'
        )
    if limit is not None and limit < 1:
        raise ValueError(f"Expected `limit` of 1 or more rows, or None for all of them, got {limit}.")
    rows = {} if data_dir is None else rows_of(names, data_dir)
    extra("lm_eval.evaluator")
    return names, rows


def title_of(name: str) -> str:
    """Return the name that a table gives a task."""
    return PERP[name].title if name in PERP else name


def percent(value: float, error: float) -> str:
    """Return an accuracy and its standard error in percent."""
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def _loaded(names: list[str], rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the tasks as `TaskManager.load` does, with their `rows` if there are any."""
    root = Path(extra("lm_eval.tasks").__file__).parent
    # Reading the definitions of all tasks takes six seconds.
    few = all(name in PERP for name in names)
    folders = list(dict.fromkeys(root / PERP[name].folder for name in names)) if few else None
    manager = extra("lm_eval.tasks").TaskManager(include_defaults=not few, include_path=folders)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ValueError(
            f"Expected tasks that lm-eval knows, got {unknown[0]!r}. `lm_eval ls tasks` lists them. "
            '"perp" means the seven tasks of the papers.'
        )
    specifications = []
    for name in names:
        changes: dict[str, Any] = {"task": name, "num_fewshot": 0}
        if name in rows:
            changes |= {"training_split": None, "validation_split": None, "test_split": None}
            changes |= {f"{PERP[name].split}_split": PERP[name].split}
            changes["custom_dataset"] = _data_set(rows[name], PERP[name].split)
        specifications.append(changes)
    # Only members of a group take changes of what lm-eval defines.
    loaded: dict[str, Any] = manager.load({"group": "peft_sparse", "task": specifications})
    for name, task in loaded["tasks"].items():
        if "acc" not in (metrics := list(task.aggregation())):
            raise ValueError(
                f"Expected tasks with an accuracy, and {name!r} has {', '.join(metrics)}. Leave it out, or evaluate "
                "it with `lm_eval.simple_evaluate`."
            )
    return loaded


def _data_set(rows: list[dict[str, Any]], split: str) -> Any:
    """Return what lm-eval calls to get the rows of a task."""
    return lambda **_: {split: extra("datasets").Dataset.from_list(rows)}


def _drawn(rows: Sequence[Any], limit: int | None, seed: int) -> list[Any]:
    """Return `limit` of the rows in their order, or all of them."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def _score(results: dict[str, Any], rows: int, total: int, version: str) -> TaskScore:
    numbers = {
        key.removesuffix(",none"): float(value) for key, value in results.items() if isinstance(value, (int, float))
    }
    accuracy, error = numbers.pop("acc"), numbers.pop("acc_stderr")
    numbers.pop("sample_len", None)
    return TaskScore(accuracy, error, rows, total, version, numbers)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep lm-eval from warning of what is done here on purpose, and from changing Python's random state."""
    state = random.getstate()
    loggers = [logging.getLogger(name) for name in ("lm_eval.models.huggingface", "lm_eval.api.task")]

    def unknown(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in KNOWN)

    for logger in loggers:
        logger.addFilter(unknown)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(unknown)
        random.setstate(state)
