"""Writes model cards: `write_card` for a folder, and `complete_card`, which every way to the Hub ends in.

A card has a part between two comments, which is written anew each time. All other text and all other fields stay.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from torch import nn

from ..model.tree import is_hub_name
from .card_facts import Facts, facts_of_folder, facts_of_model, origin_of, zeros_in_files, zeros_in_report
from .card_reports import done_in
from .card_results import results
from .card_template import Section, joined, keep_filled, sections, without_unfilled
from .card_text import HERE, card_text


CARD = "README.md"
TAGS = ("peft_sparse", "sparse", "pruned")
BEGIN = "<!-- Written by peft_sparse. Text up to the next comment is replaced when the model is saved again. -->"
END = "<!-- End of what peft_sparse wrote. -->"
_OURS = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}\n*", re.DOTALL)

# A model with fewer zeros is called dense.
PRUNED = 0.01

_PIPELINES = {"AutoModelForCausalLM": "text-generation", "AutoModelForImageTextToText": "image-text-to-text"}


def write_card(
    folder: str | Path,
    *,
    report: Any = None,
    model: nn.Module | None = None,
    base_model: str | None = None,
    repo_id: str | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Path:
    """Write the model card of a saved model, adapter or packed model: what it is, how it was made, how it is loaded.

    The card tells what the files, the model and the report say. What is not known is left out. It has metadata for the
    Hub: library, tags, base model, and perplexities as results. Fields that are filled already and text of your own
    stay. A folder of this machine is never named.

    Args:
        folder: the folder of the saved model or adapter. The card is its `README.md`.
        report: what `prune`, `reconstruct`, `residual_lora`, `perplexity_by_domain` or `compress` returned; or its
            `to_dict()`; or the path of its JSON. A list gives several of them.
        model: the saved model in memory, to count its zeros by layer. None takes the counts from the report, from the
            fingerprints of an adapter, or from the files of a plain model.
        base_model: the Hub id of the base model. None takes the one that the card or the configuration names.
        repo_id: the name on the Hub, for the lines that load the model. None leaves a gap in them.
        sizes: further sizes in bytes, by name, such as `{"packed": 123456}`.

    Returns:
        The path of the card.

    Raises:
        TypeError: `report` is not a report.
        ValueError: the folder holds no model, `base_model` is not a Hub id, or the report is of no known kind.
    """
    check_base(base_model)
    done: dict[str, Any] = {}
    for each in report if isinstance(report, (list, tuple)) else [] if report is None else [report]:
        done |= done_in(each)
    facts = facts_of_folder(folder)
    if model is not None and facts.kind in ("plain", "packed"):
        in_memory = facts_of_model(model, folder)
        facts = replace(facts, weights=in_memory.weights, sparsity=in_memory.sparsity, done=in_memory.done)
        if in_memory.base and Path(in_memory.base).resolve() != Path(folder).resolve():
            facts = replace(facts, base=in_memory.base)
    facts = replace(facts, done=facts.done | done, base=base_model or facts.base, repo_id=repo_id)
    if not facts.weights:
        facts = replace(facts, weights=zeros_in_report(done.get("pruning")))
    if not facts.weights and facts.kind == "plain" and facts.sparsity is None:
        facts = replace(facts, weights=zeros_in_files(folder), counted="entries of the matrices inside the blocks")
    facts.sizes.update(sizes or {})
    return complete_card(folder, facts, base_model=base_model)


def check_base(base_model: str | None) -> None:
    """Check that `base_model`, if it is given, can be the name of a model on the Hub.

    Raises:
        ValueError: it cannot.
    """
    if base_model is not None and not is_hub_name(base_model):
        raise ValueError(
            f"Expected `base_model` as the name of a model on the Hub, such as 'user/name', got {base_model!r}. "
            "Readers of a card cannot use a folder of this machine. Push the base model, and give its name."
        )


def complete_card(folder: str | Path, facts: Facts, *, base_model: str | None = None, before: str = "") -> Path:
    """Write what `facts` tell into the card in `folder`. A folder without a card gets one.

    Args:
        folder: the folder.
        facts: what is known.
        base_model: a Hub id that replaces the one in the card.
        before: the card that another library has just replaced. What a user had filled in it is kept.
    """
    path = Path(folder) / CARD
    card = _loaded(card_in(folder))
    old = _loaded(before)
    card.text = _OURS.sub("", card.text)
    _keep_metadata(card, old)
    source = facts.base
    facts = _with_base(card, facts, base_model)
    name = (facts.repo_id or Path(folder).absolute().name).rpartition("/")[2]
    _set_metadata(card, facts, name)
    _rename(card, Path(folder).absolute().name, name)
    text = without_unfilled(_without_folder(card.text, source), name)
    text = keep_filled(without_unfilled(_OURS.sub("", old.text), name), text) if before else text
    card.text = _with_part(text, card_text(facts))
    card.save(path)
    return path


def card_in(folder: str | Path) -> str:
    """Return the card in a folder, an empty text if there is none."""
    path = Path(folder) / CARD
    return path.read_text(encoding="utf-8") if path.exists() else ""


def name_repository(folder: str | Path, repo_id: str, name: str | None = None) -> None:
    """Let a card name the repository, in its title and in the lines that load the model, instead of a folder.

    Args:
        folder: the folder of the card.
        repo_id: the name on the Hub.
        name: the name of the folder that the card was written for. None takes that of `folder`.
    """
    card = _loaded(card_in(folder))
    card.text = card.text.replace(f'"{HERE}"', f'"{repo_id}"')
    _rename(card, name or Path(folder).absolute().name, repo_id.rpartition("/")[2])
    card.save(Path(folder) / CARD)


def _rename(card: ModelCard, old: str, new: str) -> None:
    data: Any = card.data
    parts = sections(card.text)
    for part in parts:
        if part.level == 1 and part.title == old:
            part.title = new
    card.text = joined(parts)
    if data.model_name == old:
        data.model_name = new


def part_of(folder: str | Path) -> str | None:
    """Return the part of the card in `folder` that this package wrote. None if there is none."""
    found = _OURS.search(card_in(folder))
    return found[0] if found else None


def _loaded(text: str) -> ModelCard:
    return ModelCard(text or "---\n{}\n---\n", ignore_metadata_errors=True)


def _with_base(card: ModelCard, facts: Facts, base_model: str | None) -> Facts:
    """Return `facts` with the Hub id of the base that the card names, and let the card name no folder."""
    listed = [base_model] if base_model else _listed(card.data.get("base_model"))
    known = [name for name in listed if is_hub_name(name)] if all(map(is_hub_name, listed)) else []
    named = facts.base if is_hub_name(facts.base) else None
    if not known and not named and (facts.kind in ("plain", "packed") or facts.brings_all_masks):
        named = origin_of(facts.base)
    bases = known or ([named] if named else [])
    card.data["base_model"] = (bases if len(bases) > 1 else bases[0]) if bases else None
    return replace(facts, base=bases[0], base_is_given=bases[0] != facts.base) if known else facts


def _keep_metadata(card: ModelCard, old: ModelCard) -> None:
    """Fill the fields of `card` from those of the card that it replaces."""
    data: Any = card.data
    for name, value in old.data.to_dict().items():
        if name == "model-index":
            kept: Any = old.data
            data.eval_results = [*(data.eval_results or []), *(kept.eval_results or [])]
            data.model_name = data.model_name or kept.model_name
        elif name == "tags":
            card.data["tags"] = [*_listed(card.data.get("tags")), *value]
        elif name == "base_model":
            # PEFT writes what the configuration names, also over the name that a user has written.
            card.data["base_model"] = value if all(map(is_hub_name, _listed(value))) else card.data.get(name)
        elif card.data.get(name) is None:
            card.data[name] = value


def _set_metadata(card: ModelCard, facts: Facts, name: str) -> None:
    data: Any = card.data
    is_adapter = facts.kind in ("adapter", "residual")
    library = data.get("library_name")
    # Transformers calls everything that it pushes its own, and the Hub would show how to load a whole model.
    if library is None or (is_adapter and library == "transformers"):
        data["library_name"] = "peft" if is_adapter else "transformers"
    tags = [tag for tag in _listed(data.get("tags")) if not _names_a_folder(tag)]
    pruned = facts.kind != "plain" if facts.share is None else facts.share > PRUNED
    data["tags"] = list(dict.fromkeys([*tags, *(TAGS if pruned else TAGS[:1])]))
    if data.get("pipeline_tag") is None and facts.auto_class in _PIPELINES:
        data["pipeline_tag"] = _PIPELINES[facts.auto_class]
    if is_adapter and data.get("base_model") and data.get("base_model_relation") is None:
        data["base_model_relation"] = "adapter"
    measured = results(facts.done)
    known = [each for each in data.eval_results or [] if not _is_measured_again(each, measured)]
    if known or measured:
        data.eval_results = [*known, *measured]
        data.model_name = data.model_name or name
    else:
        data.eval_results = data.model_name = None


def _is_measured_again(result: EvalResult, measured: list[EvalResult]) -> bool:
    return any(
        (result.dataset_name, result.metric_type) == (other.dataset_name, other.metric_type) for other in measured
    )


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _names_a_folder(tag: str) -> bool:
    kind, _, name = tag.rpartition(":")
    return kind.startswith("base_model") and not is_hub_name(name)


def _without_folder(text: str, base: str | None) -> str:
    """Return `text` without the folder of the base model, also where it was made a link to the Hub."""
    if not base or is_hub_name(base):
        return text
    text = text.replace(f"[{base}](https://huggingface.co/{base})", "the pruned base model")
    # A relative folder may have the name of a common word.
    return text.replace(base, "the pruned base model") if Path(base).is_absolute() else text


def _with_part(text: str, part: str) -> str:
    """Return `text` with the part of this package before its first heading below the title."""
    parts = sections(text)
    first = next((index for index, each in enumerate(parts) if each.level > 1), len(parts))
    ours = Section(lines=[BEGIN, "", *part.splitlines(), "", END])
    return joined([*parts[:first], ours, *parts[first:]])
