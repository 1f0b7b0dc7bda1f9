"""Cleans cards that other libraries begin: fields that nobody filled are left out, and those of the user are kept.

PEFT and Transformers write the template of huggingface_hub, and `Trainer` one of its own. Both have headings without
a text, marked "[More Information Needed]" and "More information needed".
"""

import re
from dataclasses import dataclass, field
from functools import cache

from huggingface_hub import ModelCard, ModelCardData


_UNFILLED = re.compile(r"\[more information needed\]|more information needed\b.*", re.IGNORECASE)
_HEADING = re.compile(r"(#{1,6}) +(.*)")
_UNTITLED = "Model Card for Model ID"
# PEFT adds this below the last heading of the template, to which it does not belong.
_ADDED = "Framework versions"
# What Transformers writes about a model of which it knows nothing.
_GENERIC = re.compile(
    r"^This model was trained from scratch on an unknown dataset\.$"
    r"|^This is the model card of a 🤗 transformers model that has been pushed on the Hub\..*$",
    re.MULTILINE,
)


@dataclass
class Section:
    """A heading with the lines below it, up to the next heading. What comes before the first heading has level 0."""

    level: int = 0
    title: str = ""
    lines: list[str] = field(default_factory=list)

    def text(self) -> str:
        head = [f"{'#' * self.level} {self.title}"] if self.level else []
        return "\n".join([*head, *self.lines])


def sections(text: str) -> list[Section]:
    """Return `text` in sections. A number sign in a block of code is no heading."""
    found, fenced = [Section()], False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith(("```", "~~~"))
        heading = None if fenced else _HEADING.fullmatch(line)
        if heading:
            found.append(Section(len(heading[1]), heading[2].strip()))
        else:
            found[-1].lines.append(line)
    return found


def joined(parts: list[Section]) -> str:
    """Return the text of sections, with one empty line between them."""
    texts = [part.text().strip("\n") for part in parts]
    return "\n\n".join(text for text in texts if text.strip()) + "\n"


def without_unfilled(text: str, name: str) -> str:
    """Return a card without fields that nobody filled, and under the title `name` if it has none of its own.

    Args:
        text: the text of the card.
        name: the name of the model.
    """
    parts = sections(_GENERIC.sub("", text.replace(" on an unknown dataset.", ".")))
    for part in parts:
        if part.title == _UNTITLED:
            part.title = name
        if not _is_written_by_user(part):
            part.lines = [line for line in part.lines if not _is_boilerplate(line)]
        else:
            part.lines = _without_gaps(part.lines)
        if not "".join(part.lines).strip():
            part.lines = []
    kept = [part for index, part in enumerate(parts) if not _is_empty(parts, index)]
    if all(part.level != 1 for part in kept):
        kept.insert(1 if kept and not kept[0].level else 0, Section(1, name))
    return joined(kept)


def keep_filled(old: str, new: str) -> str:
    """Return `new` with the sections of `old` that it lacks, at the end.

    Args:
        old: the text of the card that a library replaced.
        new: the text that it wrote.
    """
    known = {part.title for part in sections(new)}
    missing = [part for part in sections(old) if part.level > 1 and part.title not in known]
    return joined([*sections(new), *missing]) if missing else new


@cache
def _template_lines() -> frozenset[str]:
    template = ModelCard.from_template(ModelCardData()).text
    return frozenset(line.strip() for line in template.splitlines() if line.strip())


def _is_boilerplate(line: str) -> bool:
    return line.strip() in _template_lines() or bool(_UNFILLED.search(line))


def _without_gaps(lines: list[str]) -> list[str]:
    """Return the lines that say something. Where one was left out, the empty lines around it become one."""
    kept: list[str] = []
    left_out = False
    for line in lines:
        if _is_unfilled(line):
            left_out = True
        elif line.strip() or not (left_out and kept and not kept[-1].strip()):
            kept.append(line)
            left_out = left_out and not line.strip()
    return kept


def _is_unfilled(line: str) -> bool:
    """Return whether a line says nothing beside what a user has written: a field without a value, or advice."""
    return bool(_UNFILLED.search(line)) or (line.startswith("<!--") and line.strip() in _template_lines())


def _is_written_by_user(part: Section) -> bool:
    return any(line.strip() and not _is_boilerplate(line) for line in part.lines)


def _is_empty(parts: list[Section], index: int) -> bool:
    """Return whether a heading has no text, and no heading below it has one."""
    part = parts[index]
    if part.level < 2:
        return part.level == 0 and not part.lines
    for other in parts[index:]:
        if other is not part and other.level <= part.level:
            return True
        if other.lines and (other is part or other.title != _ADDED):
            return False
    return True
