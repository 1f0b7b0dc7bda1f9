"""Makes tokens of conversations, and tells the tokens of what was said from those of the chat template."""

import re
from collections.abc import Mapping, Sequence
from typing import Any


# Stands for the content of a message: characters for private use, which no text and no template holds.
MARK = "\ue000{}\ue001"
MARKED = re.compile("\ue000(\\d+)\ue001")


def tokens_of(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, assistant_only: bool, answer: bool = False
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation in its chat template, and for each token whether it counts.

    The tokens are those of `tokenizer.apply_chat_template`. Those count that lie within the content of a message.
    The others belong to the template: roles, marks of beginnings and ends, a system prompt that it adds, and what it
    writes of a message beside its content.

    Args:
        messages: dicts with the texts `role` and `content`.
        tokenizer: a fast tokenizer of transformers, with a chat template.
        assistant_only: whether only contents of messages of the role "assistant" count.
        answer: whether the beginning of an answer of the assistant follows.

    Raises:
        ValueError: a message has another form; the template changes a content, so that its tokens are not found.
    """
    check_messages(messages)
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    inside = bytearray(len(text))
    for number, start, end in _contents(messages, text, tokenizer, answer):
        if not assistant_only or messages[number]["role"] == "assistant":
            inside[start:end] = b"\1" * (end - start)
    # The template writes the special tokens.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    counted = [start < end and all(inside[start:end]) for start, end in encoded["offset_mapping"]]
    return encoded["input_ids"], counted


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Check the form of a conversation.

    Raises:
        ValueError: a message has another form, or there is none.
    """
    for number, message in enumerate(messages or [{}]):
        parts = message if isinstance(message, Mapping) else {}
        if not all(isinstance(parts.get(name), str) for name in ("role", "content")):
            found = ", ".join(f"{name!r}: {type(value).__name__}" for name, value in parts.items())
            raise ValueError(
                f"Expected message {number} of a conversation as a dict with the texts `role` and `content`, as chat "
                f"templates take it, got {{{found}}}. Convert the conversations, and leave out calls of tools and "
                "images."
            )


def _contents(
    messages: Sequence[Mapping[str, Any]], text: str, tokenizer: Any, answer: bool
) -> list[tuple[int, int, int]]:
    """Return (number of the message, start, end) of each content in `text`, the conversation in its template."""
    marked = [{**message, "content": MARK.format(number)} for number, message in enumerate(messages)]
    parts = MARKED.split(tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=answer))
    found = _placed(parts, messages, text)
    if found is None:
        raise ValueError(
            "Expected a chat template that writes the contents of messages as they are, up to spaces at their ends. "
            f"That of {type(tokenizer).__name__} changes this conversation of {len(messages)} messages, so the tokens "
            "of the template are not known. Give the texts in which all tokens count: "
            "`tokenizer.apply_chat_template(messages, tokenize=False)`."
        )
    return found


def _placed(parts: list[str], messages: Sequence[Mapping[str, Any]], text: str) -> list[tuple[int, int, int]] | None:
    """Return the contents in `text`; None if it is not made of `parts`, which are template, number, template, ..."""
    if not text.startswith(parts[0]):
        return None
    found, position = [], len(parts[0])
    for number, after in zip(map(int, parts[1::2]), parts[2::2], strict=True):
        content = messages[number]["content"]
        # Templates trim contents in these ways.
        ways = (content, content.rstrip(), content.lstrip(), content.strip(), content.strip("\n"))
        way = next((way for way in ways if text.startswith(way + after, position)), None)
        if way is None:
            return None
        found.append((number, position, position + len(way)))
        position += len(way) + len(after)
    return found if position == len(text) else None
