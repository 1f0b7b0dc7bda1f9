"""What a card says of the run that made a model: pruning, calibration, recovery, their cost, and their papers."""

import re
from typing import Any

from .card_facts import Facts


METHODS = {"MASK_LORA": "MaskLoRA", "SCALED_LORA": "ScaledLoRA"}
PAPERS = {
    "magnitude": "Magnitude: Han et al. 2015, [arXiv:1506.02626](https://arxiv.org/abs/1506.02626)",
    "wanda": "Wanda: Sun et al. 2023, [arXiv:2306.11695](https://arxiv.org/abs/2306.11695)",
    "sparsegpt": "SparseGPT: Frantar and Alistarh 2023, [arXiv:2301.00774](https://arxiv.org/abs/2301.00774)",
    "gblm": "GBLM: Das et al. 2023, [arXiv:2311.04902](https://arxiv.org/abs/2311.04902)",
    "owl": "OWL: Yin et al. 2023, [arXiv:2310.05175](https://arxiv.org/abs/2310.05175)",
    "lamp": "LAMP: Lee et al. 2020, [arXiv:2010.07611](https://arxiv.org/abs/2010.07611)",
    "erk": "ERK: Evci et al. 2020, [arXiv:1911.11134](https://arxiv.org/abs/1911.11134)",
    "dsnot": "DSnoT: Zhang et al. 2023, [arXiv:2310.08915](https://arxiv.org/abs/2310.08915)",
    "swap": "SparseSwaps: Zimmer et al. 2025, [arXiv:2512.10922](https://arxiv.org/abs/2512.10922)",
    "perp": "PERP, with MaskLoRA and ScaledLoRA: Zimmer et al. 2023, "
    "[arXiv:2312.15230](https://arxiv.org/abs/2312.15230)",
    "free_lunch": "A Free Lunch in LLM Compression, 2025, [arXiv:2510.14444](https://arxiv.org/abs/2510.14444)",
    "eora": "EoRA: Liu et al. 2024, [arXiv:2410.21271](https://arxiv.org/abs/2410.21271)",
}


def method(facts: Facts) -> str:
    """Return the name of an adapter's method, as people write it."""
    value = facts.adapter.get("peft_type")
    name = str(getattr(value, "value", value))
    return METHODS.get(name, name)


def how_made(facts: Facts) -> str:
    """Return the section that says what was done, with what, and at which cost. Empty if nothing is known."""
    done = facts.done
    lines = [
        _told("Recipe", f"`{done['recipe']}`" if done.get("recipe") else ""),
        _told("Pruning", _pruning(done.get("pruning"))),
        _told("Calibration", _calibration(done)),
        _told("Reconstruction", _reconstruction(done.get("reconstruction"))),
        _told("Retraining", _retraining(done)),
        _told("Correction", _correction(done.get("residual"))),
        _told("Adapter", _adapter(facts)),
        _told("Cost", _cost(done)),
        _told("Made with", _versions(done)),
    ]
    told = [line for line in lines if line]
    return "## How it was made\n\n" + "\n".join(told) if told else ""


def _told(what: str, words: str) -> str:
    return f"- **{what}:** {words}" if words else ""


def _pruning(pruning: dict[str, Any] | None) -> str:
    if not pruning:
        return ""
    parts = [f"criterion `{pruning['criterion']}`"]
    parts += [f"compared per {pruning['group']}"] if pruning.get("group") else []
    parts += [f"allocation `{pruning['allocation']}`"] if pruning.get("allocation") else []
    parts += [f"refinement `{pruning['refinement']}`"] if pruning.get("refinement") else []
    parts += ["kept weights updated by least squares"] if pruning.get("update") else []
    error = pruning.get("error")
    told = f". Mean relative output error of the weights {error:.4f}" if error is not None else ""
    return f"{', '.join(parts)}{told}."


def _calibration(done: dict[str, Any]) -> str:
    text = (done.get("texts") or {}).get("calibration") or (done.get("texts") or {}).get("train")
    samples = (done.get("arguments") or {}).get("calibration_samples")
    if text:
        count = min(samples or text["sequences"], text["sequences"])
        return f"{count:,} sequences of {text['length']:,} tokens, digest of the text `{text['digest']}`."
    count = (done.get("pruning") or {}).get("calibration_sequences")
    return f"{count:,} sequences." if count else ""


def _reconstruction(report: dict[str, Any] | None) -> str:
    if not report:
        return ""
    regions = report["regions"]
    before, after = (sum(region[name] for region in regions) / len(regions) for name in ("error_pruned", "error"))
    reverted = sum(bool(region["reverted"]) for region in regions)
    return (
        f"{len(regions)} regions ({report['region']}, mode {report['mode']}, tuner `{report['tuner']}`, loss "
        f"`{report['loss']}`) fitted to the outputs of the dense model. Mean relative error {before:.4f} before and "
        f"{after:.4f} after, {reverted} undone."
    )


def _retraining(done: dict[str, Any]) -> str:
    report = done.get("retraining") or {}
    stage: dict[str, Any] = next((s for s in done.get("stages") or () if s["name"] == "retrained"), {})
    parts = [f"{report['steps']:,} steps of {report['batch_size']:,} sequences"] if report.get("steps") else []
    parts += [f"{stage['tokens']:,} tokens"] if stage.get("tokens") else []
    parts += [f"learning rate {report['learning_rate']:.3g}"] if report.get("learning_rate") else []
    parts += [f"distillation `{report['distillation']}`"] if report.get("distillation") else []
    parts += [report["trained"]] if report.get("trained") in ("all weights", "some weights") else []
    loss = report.get("eval_loss")
    parts += [f"loss on the evaluation set {loss:.4f}"] if loss is not None else []
    return f"{', '.join(parts)}." if parts else ""


def _correction(report: dict[str, Any] | None) -> str:
    if not report:
        return ""
    return (
        f"rank {report['r']}, {report['parameters']:,} parameters. Mean relative output error "
        f"{report['error_pruned']:.4f} without the adapter and {report['error']:.4f} with it."
    )


def _adapter(facts: Facts) -> str:
    r = facts.adapter.get("r")
    mask = ", with its masks" if facts.adapter.get("save_mask") else ""
    return f"{method(facts)}, rank {r}{mask}." if facts.kind == "adapter" and r else ""


def _cost(done: dict[str, Any]) -> str:
    stages = {s["name"]: s["seconds"] for s in done.get("stages") or () if s.get("seconds")}
    if not stages:
        # The report of a reconstruction contains the time of its pruning.
        names = {"pruning": "pruned", "reconstruction": "reconstructed", "retraining": "retrained"}
        found = {word: (done.get(name) or {}).get("seconds") for name, word in names.items()}
        found |= {"pruned": None} if found["reconstructed"] else {}
        stages = {word: seconds for word, seconds in found.items() if seconds}
    parts = [
        f"{name} in {seconds:.0f} s" if seconds >= 10 else f"{name} in {seconds:.1f} s"
        for name, seconds in stages.items()
    ]
    memories = [
        done.get("peak_memory_bytes"),
        *((done.get(n) or {}).get("peak_memory") for n in ("reconstruction", "pruning")),
    ]
    memory = next((value for value in memories if value), None)
    parts += [f"peak memory {memory / 2**30:.1f} GiB"] if parts and memory else []
    hardware = (done.get("environment") or {}).get("hardware")
    return f"{', '.join(parts)}{f' ({hardware})' if hardware else ''}." if parts else ""


def _versions(done: dict[str, Any]) -> str:
    versions = (done.get("environment") or {}).get("versions") or {}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def papers(facts: Facts) -> str:
    """Return the section with the papers of the methods that were used. Empty if none is known."""
    pruning, done = facts.done.get("pruning") or {}, facts.done
    told = " ".join(str(pruning.get(name) or "") for name in ("criterion", "allocation", "refinement")).lower()
    keys = [key for key in PAPERS if key in re.split(r"[^a-z]+", told)]
    keys += ["perp"] if facts.kind == "adapter" or "reconstruction" in done or "retraining" in done else []
    keys += ["free_lunch"] if "reconstruction" in done else []
    keys += ["eora"] if facts.kind == "residual" else []
    return "## Papers\n\n" + "\n".join(f"- {PAPERS[key]}" for key in keys) if keys else ""
