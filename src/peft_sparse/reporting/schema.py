"""The schema of `report.json`: what a run did, with what, and what came of it."""

import math
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from ..model.environment import environment
from ..pruning.report import PruningReport
from ..reconstruction.report import ReconstructionReport
from ..reconstruction.residual_report import ResidualReport
from ..structured.report import StructuredReport
from .names import without_folders


# The version that this package writes. Any change of the fields below raises it.
SCHEMA = 1


@dataclass(frozen=True)
class Stage:
    """A model after one stage of a run.

    Args:
        name: "dense", "pruned", "reconstructed", "retrained", "saved", or a name of the caller.
        perplexity: the perplexity on each text, by the name of the text. Empty if none was measured.
        sparsity: the fraction of zeros in the prunable weights. None if it is not known.
        seconds: how long the stage took, without measurements of perplexity. 0 for a stage that only measures.
        cpu_seconds: the time of all cores of this process for it. 0 if it was not measured.
        tokens: how many tokens the stage read, counted again in every pass. 0 if they were not counted.
        peak_memory_bytes: the largest memory of this process up to the end of the stage. None if it was not measured.
    """

    name: str
    perplexity: dict[str, float] = field(default_factory=dict)
    sparsity: float | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens: int = 0
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class ModelFacts:
    """The model of a run, at its end.

    Args:
        name: the name on the Hub, or the last part of the folder from which the model was loaded. None if it was made
            from a configuration.
        kind: the class of the base model, such as "LlamaForCausalLM".
        dtype: the dtype of most parameters, such as "bfloat16".
        parameters: the number of parameters, without those of adapters.
        prunable: how many of them are entries of weights that are pruned by default.
        trained: the number of parameters that are trained, with those of adapters.
        adapter: the type of the PEFT adapter, such as "MASK_LORA". None without one.
        fingerprint: a hash of names, shapes, dtypes and sums of all parameters. None if they are split among
            processes. Two runs with equal fingerprints ended with equal models.
    """

    name: str | None
    kind: str
    dtype: str
    parameters: int
    prunable: int
    trained: int
    adapter: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class SavedModel:
    """A model or an adapter that the run saved.

    Args:
        folder: the folder, relative to that of the report.
        kind: "model" or "adapter".
        auto_class: the class of Transformers that loads the model, or the base of the adapter.
        base: for an adapter, the folder of its base model, relative to that of the report, or its name on the Hub.
        bytes: the size of the weights on disk.
        sha256: the digest of each file of weights, by its name.
    """

    folder: str
    kind: str = "model"
    auto_class: str = "AutoModelForCausalLM"
    base: str | None = None
    bytes: int = 0
    sha256: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunReport:
    """What a run did, with what, and what came of it. The content of `report.json`.

    Only what a run has is set. `write_report` writes the report as JSON and as a page.

    Args:
        task: "prune", "prune_structured", "reconstruct", "residual_lora", "train" or "compress".
        recipe: the name of the recipe of `compress`.
        arguments: the arguments that differ from their defaults, without folders and tokens.
        seed: the seed of the run.
        model: the model.
        stages: the model after each stage, in order.
        peak_memory_bytes: the largest memory of the process: GPU memory if there is a GPU, else resident memory.
        pruning: the report of the pruning.
        reconstruction: the report of the reconstruction. Its pruning is `pruning`.
        structured: the report of `prune_structured`.
        residual: the report of `residual_lora`.
        logs: the log history of each training, by its name, "reconstruction" or "training". Each entry is one of
            `Trainer.state.log_history`.
        texts: number and length of the sequences and a digest of each text, as far as they are known, by its name.
        saved: what the run saved.
        resumed: whether the run was stopped and continued. Times and memory are then those of the last part.
        created: when the report was made, in UTC.
        environment: command without folders, versions and hardware.
    """

    task: str
    recipe: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    model: ModelFacts | None = None
    stages: tuple[Stage, ...] = ()
    peak_memory_bytes: int | None = None
    pruning: PruningReport | None = None
    reconstruction: ReconstructionReport | None = None
    structured: StructuredReport | None = None
    residual: ResidualReport | None = None
    logs: dict[str, tuple[dict[str, Any], ...]] = field(default_factory=dict)
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    saved: tuple[SavedModel, ...] = ()
    resumed: bool = False
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    environment: dict[str, Any] = field(default_factory=lambda: _environment())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON can hold. The first of them is the version of the schema.

        JSON has no infinity and no "not a number". Such numbers become the strings "inf", "-inf" and "nan".
        """
        plain: dict[str, Any] = _plain({"schema": SCHEMA} | asdict(self))
        if self.reconstruction is not None:
            # It is the report's own `pruning`, which may hold thousands of weights.
            del plain["reconstruction"]["pruning"]
        for name in ("pruning", "structured", "residual"):
            own = getattr(self, name)
            if own is not None:
                # With the means, which readers of the JSON would have to compute.
                plain[name] = _plain(own.to_dict())
        return plain

    def __str__(self) -> str:
        """The stages as a Markdown table."""
        texts = list(dict.fromkeys(text for stage in self.stages for text in stage.perplexity))
        names = ["perplexity"] if len(texts) == 1 else [f"perplexity, {text}" for text in texts]
        head = ["stage", *names, "sparsity", "tokens", "minutes"]
        rows = [
            [
                stage.name,
                *(f"{stage.perplexity[text]:.2f}" if text in stage.perplexity else "" for text in texts),
                "" if stage.sparsity is None else f"{stage.sparsity:.4f}",
                f"{stage.tokens:,}" if stage.tokens else "",
                f"{stage.seconds / 60:.1f}" if stage.seconds else "",
            ]
            for stage in self.stages
        ]
        rule = ["---", *("---:" for _ in head[1:])]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _environment() -> dict[str, Any]:
    told = environment()
    return told | {"command": without_folders(told["command"])}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    # A number of NumPy or torch, or an object that only its text describes.
    return _plain(value.item()) if hasattr(value, "item") and getattr(value, "size", 1) == 1 else str(value)
