"""Compares models side by side: perplexity, tasks, size, sparsity, generation, agreement with the first."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.inputs import output_of
from ..calibration.sources import texts_of
from ..model.blocks import prunable_weights
from ..model.environment import environment
from ..model.kinds import count_zeros
from ..model.weights import DENSE
from .generation import GenerationSpeed, generation_speeds
from .kernels import KernelReport, kernel_speed
from .loading import LoadedModel, check_source, load_model, load_tokenizer, short_names
from .perplexity import mean_loss
from .protocol import WINDOW, TextPerplexity, check_window, described, windows_of
from .tables import markdown
from .tasks import TaskReport, check_tasks, evaluate_tasks, percent, title_of


@dataclass(frozen=True)
class ComparedModel:
    """What was measured of one model. None stands for what was not measured.

    Args:
        name: what the table calls it.
        base: the name of the base, if it is an adapter.
        dtype: the dtype of its weights.
        size: the size of its weights on disk in bytes. Of an adapter, without its base.
        sparsity: the fraction of zeros among the prunable weights, see `sparsity`. Of an adapter, that of its base.
        perplexity: the perplexity on the text.
        agreement: the fraction of the tokens counted in `perplexity` for which the most likely token is that of the
            first model. Both models read the same text before each token.
        tasks: the zero-shot accuracies.
        generation: how fast it generates.
        kernels: whether sparse kernels are faster for its matrices.
        no_kernels: why this was asked for and not measured: the model is dense.
    """

    name: str
    base: str | None
    dtype: str
    size: int | None
    sparsity: float
    perplexity: TextPerplexity | None = None
    agreement: float | None = None
    tasks: TaskReport | None = None
    generation: GenerationSpeed | None = None
    kernels: KernelReport | None = None
    no_kernels: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what was measured as plain values for JSON."""
        found = {key: value for key, value in vars(self).items() if value is not None}
        found |= {key: found[key].to_dict() for key in ("perplexity", "tasks", "kernels") if key in found}
        return found | ({"generation": vars(self.generation)} if self.generation else {})


@dataclass(frozen=True)
class Comparison:
    """Models side by side. `str()` is a table in Markdown with a line that says how it was measured.

    Args:
        models: what was measured of each model. Agreement and speed are relative to the first.
        environment: versions and hardware.
    """

    models: list[ComparedModel]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain values for JSON."""
        return {"models": [model.to_dict() for model in self.models], "environment": self.environment}

    def __str__(self) -> str:
        first = self.models[0]
        columns: list[list[str]] = [
            ["model", *(f"{one.name} on {one.base}" if one.base else one.name for one in self.models)],
            ["dtype", *(one.dtype for one in self.models)],
            ["on disk", *(size_of(one) for one in self.models)],
            ["sparsity", *(f"{one.sparsity:.4f}" for one in self.models)],
        ]
        notes = []
        if first.perplexity is not None:
            columns.append(["perplexity", *(f"{one.perplexity.perplexity:.2f}" for one in self.models)])  # type: ignore[union-attr]
            columns.append(["agreement", *(f"{100 * (one.agreement or 0):.1f} %" for one in self.models)])
            notes.append(_text_note(first.perplexity))
        if first.tasks is not None:
            for name in first.tasks.scores:
                scores = [one.tasks.scores[name] for one in self.models if one.tasks]
                columns.append([title_of(name), *(percent(s.accuracy, s.standard_error) for s in scores)])
            reports = [one.tasks for one in self.models if one.tasks]
            columns.append(["mean", *(percent(report.mean, report.mean_error) for report in reports)])
            notes.append(_task_note(first.tasks))
        if first.generation is not None:
            speeds = [one.generation for one in self.models if one.generation]
            columns.append(["tokens/s", *(f"{speed.tokens_per_second:.1f}" for speed in speeds)])
            columns.append(["speed", *map(_ratio, speeds)])
            notes.append(
                "Speed: tokens per second divided by those of the first model, measured alternately: the median of "
                "the rounds (lowest to highest)."
            )
        head, *rows = map(list, zip(*columns, strict=True))
        parts = [markdown(head, rows), "\n".join(notes)]
        parts += [f"Sparse kernels, {one.name}:\n\n{one.kernels}" for one in self.models if one.kernels]
        parts += [f"Sparse kernels, {one.name}: {one.no_kernels}." for one in self.models if one.no_kernels]
        return "\n\n".join(filter(None, parts))


def compare_models(
    models: Sequence[str | Path | LoadedModel],
    documents: Iterable[Any] | None = None,
    *,
    window: int = WINDOW,
    max_windows: int | None = None,
    tasks: str | Sequence[str] | None = None,
    limit: int | None = None,
    data_dir: str | Path | None = None,
    new_tokens: int = 32,
    rounds: int = 5,
    kernels: bool = False,
    seed: int = 0,
    batch_size: int = 1,
    base: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> Comparison:
    """Return what models cost and how good they are, side by side. The first is what others are compared with.

    Size on disk and sparsity are always measured. Perplexity and agreement need `documents`, and accuracies need
    `tasks`. All models must have one tokenizer, because numbers per token cannot be compared otherwise.

    Args:
        models: folders or Hub ids of models and adapters, or models in memory. The first should be the dense model.
        documents: texts, in the order in which they are joined; or a `datasets.Dataset` with a column "text"; or one
            text. None measures no perplexity.
        window: tokens of a window.
        max_windows: measure only so many windows, from the beginning of the text. By default all of them.
        tasks: "perp", or names of tasks, see `evaluate_tasks`. None evaluates no task.
        limit: evaluate at most so many rows of each task, drawn at random. By default all rows are evaluated.
        data_dir: a folder with the rows of the seven tasks, see `evaluate_tasks`.
        new_tokens: how many tokens are generated to measure the speed.
        rounds: how many rounds of generation are counted. All models are then in memory together. 0 measures no
            speed, and each model leaves memory before the next one is loaded.
        kernels: whether sparse kernels are measured for each model that is not dense, see `kernel_speed`.
        seed: seed of the rows and of the prompt.
        batch_size: how many windows and prompts of tasks run together.
        base: the base of all adapters, if it is not where their configurations say.
        dtype: the dtype of the weights. "auto" takes the one in which they are saved.
        device: the device. By default the GPU if there is one, else the CPU.

    Raises:
        TypeError: `models` is no list of such models.
        ValueError: there is no model, or one is named twice; an argument has no effect; tokenizers differ; see also
            `text_perplexity`, `evaluate_tasks` and `generation_speeds`.
        FileNotFoundError: there is no model of that name, or the base of an adapter is not where it says.
        ImportError: `tasks` are given and lm-eval is not installed.
    """
    if isinstance(models, (str, Path)) or not all(isinstance(one, (str, Path, LoadedModel)) for one in models):
        raise TypeError(
            "Expected `models` as a list of folders, Hub ids or `LoadedModel(name, model, tokenizer)`, got "
            f"{type(models).__name__ if isinstance(models, (str, Path)) else [type(one).__name__ for one in models]}."
        )
    names = _names(models)
    if rounds < 0 or new_tokens < 1:
        raise ValueError(
            f"Expected `rounds` of 0 or more, and `new_tokens` of 1 or more, got {rounds} and {new_tokens}. "
            "`rounds=0` measures no speed."
        )
    _check_all_used(documents, tasks, window=window, max_windows=max_windows, limit=limit, data_dir=data_dir)
    if tasks is not None:
        check_tasks(tasks, limit, data_dir)
    for source in models:
        if not isinstance(source, LoadedModel):
            check_source(source, base)
    texts = None if documents is None else list(texts_of(documents))
    windows = None if texts is None else _windows(models, texts, window, max_windows, base)
    measured: list[ComparedModel] = []
    kept: dict[str, nn.Module] = {}
    reference: Tensor | None = None
    for source, name in zip(models, names, strict=True):
        if isinstance(source, LoadedModel):
            loaded = source
        else:
            loaded = load_model(source, name=name, base=base, dtype=dtype, device=device)
        row = _weights(loaded)
        if kernels and row.sparsity > DENSE:
            row = replace(row, kernels=kernel_speed(loaded.model, seed=seed))
        elif kernels:
            row = replace(row, no_kernels=f"not measured, because it is dense (sparsity {row.sparsity:.4f})")
        if windows is not None and texts is not None:
            check_window(loaded.model, window)
            loss, count, choices = _choices(loaded.model, windows, batch_size)
            reference = choices if reference is None else reference
            agreement = float((choices == reference).double().mean())
            row = replace(row, perplexity=described(loss, count, windows, texts), agreement=agreement)
        if tasks is not None:
            options: Any = {"limit": limit, "seed": seed, "data_dir": data_dir, "batch_size": batch_size}
            row = replace(row, tasks=evaluate_tasks(loaded.model, loaded.tokenizer, tasks, **options))
        measured.append(row)
        if rounds:
            kept[loaded.name] = loaded.model
        del loaded
    if rounds:
        speeds = generation_speeds(kept, new_tokens=new_tokens, rounds=rounds, seed=seed)
        measured = [replace(row, generation=speeds[row.name]) for row in measured]
    return Comparison(measured, {key: value for key, value in environment().items() if key != "command"})


def _check_all_used(documents: Any, tasks: Any, *, window: int, max_windows: Any, limit: Any, data_dir: Any) -> None:
    of_text = {"window": window != WINDOW, "max_windows": max_windows is not None}
    of_tasks = {"limit": limit is not None, "data_dir": data_dir is not None}
    for what, missing, given in (("documents", documents is None, of_text), ("tasks", tasks is None, of_tasks)):
        unused = [name for name, is_given in given.items() if is_given]
        if missing and unused:
            verb = "perplexity is measured on" if what == "documents" else "are evaluated"
            raise ValueError(
                f"`{unused[0]}` has no effect without `{what}`, which {verb}. Give `{what}`, or leave it out."
            )


def size_of(model: ComparedModel) -> str:
    """Return the size on disk of a model for a table."""
    size = "" if model.size is None else f"{model.size / 1e6:,.1f} MB"
    return f"{size} + base" if model.base and size else size


def _names(models: Sequence[str | Path | LoadedModel]) -> list[str]:
    """Return what the table calls each model.

    Raises:
        ValueError: there is no model, or two have one name.
    """
    if not models:
        raise ValueError("Expected at least one model, got none. Give folders or Hub ids.")
    short = iter(short_names([source for source in models if not isinstance(source, LoadedModel)]))
    names = [source.name if isinstance(source, LoadedModel) else next(short) for source in models]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Expected models with different names, got {twice!r} twice. Rename the model in memory.")
    return names


def _windows(
    models: Sequence[str | Path | LoadedModel],
    texts: list[str],
    window: int,
    max_windows: int | None,
    base: str | None,
) -> Tensor:
    """Return the windows of the text, which must be the same for every model.

    Raises:
        ValueError: they are not.
    """
    first: Tensor | None = None
    for source in models:
        tokenizer = source.tokenizer if isinstance(source, LoadedModel) else load_tokenizer(source, base)
        found = windows_of(texts, tokenizer, window, max_windows)
        first = found if first is None else first
        if not torch.equal(found, first):
            raise ValueError(
                f"Expected models with one tokenizer, and that of {getattr(source, 'name', str(source))!r} makes "
                "other tokens of the text than that of the first model. Numbers per token cannot be compared. "
                "Evaluate these models one by one."
            )
    assert first is not None
    return first


def _weights(loaded: LoadedModel) -> ComparedModel:
    zeros, entries = count_zeros(prunable_weights(loaded.model))
    dtype = str(next(parameter.dtype for parameter in loaded.model.parameters() if parameter.is_floating_point()))
    return ComparedModel(loaded.name, loaded.base, dtype.removeprefix("torch."), loaded.size, zeros / entries)


def _choices(model: nn.Module, windows: Tensor, batch_size: int) -> tuple[float, int, Tensor]:
    """Return (mean loss, number of counted tokens, the most likely tokens), measured in one pass."""
    found: list[Tensor] = []

    def record(module: nn.Module, args: Any, outputs: Any) -> None:
        found.append(output_of(outputs, "logits")[:, :-1].argmax(-1).cpu())

    handle = model.register_forward_hook(record)
    try:
        loss, count = mean_loss(model, windows, batch_size, "documents")
    finally:
        handle.remove()
    return loss, count, torch.cat(found)


def _ratio(speed: GenerationSpeed) -> str:
    if speed.lowest == speed.highest == 1:
        return "1.00"
    return f"{speed.ratio:.2f} ({speed.lowest:.2f} to {speed.highest:.2f})"


def _text_note(text: TextPerplexity) -> str:
    return (
        f"Perplexity: {text.windows} windows of {text.window} tokens, {text.tokens:,} counted, text digest "
        f"{text.text_digest}. Agreement: how often the most likely next token is that of the first model."
    )


def _task_note(tasks: TaskReport) -> str:
    drawn = "" if tasks.seed is None else f", rows drawn with seed {tasks.seed}"
    rows = sorted({score.rows for score in tasks.scores.values()})
    counts = f"{rows[0]}" if len(rows) == 1 else f"{rows[0]} to {rows[-1]}"
    return f"Tasks: acc in percent ± standard error, zero-shot, {counts} rows each{drawn}, lm-eval {tasks.lm_eval}."
