"""What a page says in words and tables: what was done, the stages, how to load the result, and by what it was made."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from .names import without_folders
from .scales import of_size, of_time, spelled
from .schema import RunReport, SavedModel, Stage


_TASKS = {
    "prune": "pruned",
    "prune_structured": "pruned by whole units",
    "reconstruct": "reconstructed",
    "residual_lora": "corrected by a low-rank residual",
    "train": "retrained",
    "compress": "compressed",
}


def title_of(report: RunReport) -> str:
    """Return what the page is about in one line."""
    name = report.model.name or report.model.kind if report.model else "A model"
    how = f" by the recipe {report.recipe}" if report.recipe else ""
    return f"{name}, {_TASKS.get(report.task, report.task)}{how}"


def tiles_of(report: RunReport) -> list[tuple[str, str, str]]:
    """Return the numbers at the top of the page: (what, number, remark)."""
    tiles = []
    share = next((stage.sparsity for stage in reversed(report.stages) if stage.sparsity is not None), None)
    if share is not None:
        tiles.append(("sparsity", f"{share:.4f}", "fraction of zeros in the prunable weights"))
    for text in texts_of(report):
        known = [stage for stage in report.stages if text in stage.perplexity]
        first, last = known[0], known[-1]
        arrow = f"{first.perplexity[text]:.2f} → {last.perplexity[text]:.2f}"
        tiles.append(("perplexity", arrow, f"{first.name} → {last.name}; {text}"))
    if report.structured:
        tiles.append(("parameters removed", f"{report.structured.removed:.4f}", "fraction of those of all units"))
    if total := sum(stage.seconds for stage in report.stages):
        tiles.append(("time", of_time(total), "of all stages, without measurements"))
    if report.peak_memory_bytes:
        tiles.append(("peak memory", of_size(report.peak_memory_bytes), "of the process"))
    return tiles


def texts_of(report: RunReport) -> list[str]:
    """Return the names of the texts on which perplexity was measured."""
    return list(dict.fromkeys(text for stage in report.stages for text in stage.perplexity))


def done(report: RunReport) -> list[tuple[str, str]]:
    """Return what was done and with what: (what, sentence)."""
    rows = []
    if report.model:
        model = report.model
        name = f"{model.name}, a {model.kind}" if model.name else model.kind
        rows.append(
            ("Model", f"{name}: {model.parameters:,} parameters in {model.dtype}, {model.prunable:,} prunable")
        )
    if report.recipe:
        rows.append(("Recipe", report.recipe))
    rows += [*_of_pruning(report), *_of_reconstruction(report)]
    if report.structured:
        rows.append(("Pruning of units", f"{report.structured}"))
    if report.residual:
        residual = report.residual
        rows.append(("Low-rank residual", f"rank {residual.r}, {residual.parameters:,} parameters"))
        rows.append(("Output error", f"{residual.error_pruned:.4f} → {residual.error:.4f}, mean over the weights"))
    training = report.logs.get("training")
    if training and report.model:
        steps = max((entry.get("step", 0) for entry in training), default=0)
        share = report.model.trained / max(1, report.model.parameters)
        of = f", adapter {report.model.adapter}" if report.model.adapter else ""
        rows.append(("Training", f"{steps:,} steps, {report.model.trained:,} parameters trained ({share:.2%}){of}"))
    return rows


def _of_pruning(report: RunReport) -> list[tuple[str, str]]:
    pruning = report.pruning
    if pruning is None:
        return []
    how = [f"criterion {pruning.criterion}", f"pattern {pruning.pattern}"]
    how += [f"compared per {pruning.group}"] if pruning.group else []
    how += [f"allocation {pruning.allocation}"] if pruning.allocation else []
    how += [f"refinement {pruning.refinement}"] if pruning.refinement else []
    how += ["kept weights updated"] if pruning.update else []
    rows = [("Pruning", f"{len(pruning.weights):,} weights to sparsity {pruning.sparsity:.4f}: {', '.join(how)}")]
    if pruning.error is not None:
        before = pruning.error_selected
        first = "" if before is None else f" ({before:.4f} before refinement and update)"
        rows.append(("Output error", f"{pruning.error:.4f}, mean over the weights{first}"))
    if pruning.left_out:
        reasons = Counter(pruning.left_out.values()).most_common()
        rows.append(("Not pruned", ", ".join(f"{reason}: {count}" for reason, count in reasons)))
    return rows


def _of_reconstruction(report: RunReport) -> list[tuple[str, str]]:
    found = report.reconstruction
    if found is None or not found.regions:
        return []
    tuner = "all parameters" if found.tuner == "full" else found.tuner
    undone = sum(region.reverted for region in found.regions)
    whole = sum(region.whole is not None for region in found.regions)
    how = f"{len(found.regions)} regions of size {found.region}, mode {found.mode}, loss {found.loss}, {tuner} fitted"
    how += (f"; {undone} fits undone" if undone else "") + (f"; {whole} blocks fitted whole" if whole else "")
    before = sum(region.error_pruned for region in found.regions) / len(found.regions)
    after = sum(region.error for region in found.regions) / len(found.regions)
    return [("Reconstruction", how), ("Error of regions", f"{before:.4f} → {after:.4f}, mean over the regions")]


def stage_table(report: RunReport) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table of stages, without the columns of which nothing is known."""
    texts = texts_of(report)

    def of(stage: Stage) -> dict[str, str]:
        cells = {"stage": stage.name}
        for text in texts:
            name = "perplexity" if len(texts) == 1 else f"perplexity, {text}"
            cells[name] = f"{stage.perplexity[text]:.2f}" if text in stage.perplexity else ""
        cells["sparsity"] = "" if stage.sparsity is None else f"{stage.sparsity:.4f}"
        cells["tokens"] = f"{stage.tokens:,}" if stage.tokens else ""
        cells["time"] = of_time(stage.seconds) if stage.seconds else ""
        cells["processor time"] = of_time(stage.cpu_seconds) if stage.cpu_seconds else ""
        cells["peak memory"] = of_size(stage.peak_memory_bytes) if stage.peak_memory_bytes else ""
        return cells

    rows = [of(stage) for stage in report.stages]
    head = [name for name in (rows[0] if rows else {}) if any(row[name] for row in rows)]
    return head, [[row[name] for name in head] for row in rows]


def loading(saved: SavedModel) -> str:
    """Return the lines of Python that load what was saved."""
    if saved.kind != "adapter":
        return (
            f"from transformers import {saved.auto_class}\n\n"
            f"model = {saved.auto_class}.from_pretrained({saved.folder!r})"
        )
    base = "..." if saved.base is None else saved.base
    return (
        "import peft_sparse  # registers the method with PEFT\n"
        f"from peft import PeftModel\nfrom transformers import {saved.auto_class}\n\n"
        f"model = {saved.auto_class}.from_pretrained({base!r})  # the pruned base model\n"
        f"model = PeftModel.from_pretrained(model, {saved.folder!r})\n"
        "model = model.merge_and_unload()  # a plain model with the same zeros"
    )


def made_by(report: RunReport) -> list[tuple[str, str]]:
    """Return seed, versions, hardware and digests: (what, value)."""
    told = report.environment
    rows = [("Seed", str(report.seed))] if report.seed is not None else []
    rows += [("Command", without_folders(str(told["command"])))] if told.get("command") else []
    rows += [("Python", str(told["python"]))] if told.get("python") else []
    rows += [("Versions", ", ".join(f"{name} {version}" for name, version in told.get("versions", {}).items()))]
    rows += [("Hardware", f"{told['hardware']}, threads: {told.get('threads', '?')}")] if told.get("hardware") else []
    rows += [("Date", report.created)] if report.created else []
    if report.model and report.model.fingerprint:
        rows.append(("Parameters", f"fingerprint {report.model.fingerprint}"))
    rows += [(f"Text: {name}", _of_text(facts)) for name, facts in report.texts.items()]
    for saved in report.saved:
        rows += [(f"{saved.folder}/{name}", f"sha256 {digest}") for name, digest in saved.sha256.items()]
    return [(name, value) for name, value in rows if value]


def _of_text(facts: Mapping[str, Any]) -> str:
    known = [f"{facts['sequences']:,} sequences"] if "sequences" in facts else []
    known += [f"of {facts['length']:,} tokens"] if "length" in facts else []
    return " ".join(known) + (f", digest {facts['digest']}" if "digest" in facts else "")


def arguments_of(report: RunReport) -> list[tuple[str, str]]:
    """Return the arguments that differ from their defaults, as text."""
    return [
        (name, spelled(value) if isinstance(value, float) else without_folders(str(value)))
        for name, value in report.arguments.items()
    ]
