import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_sparse.calibration.chat import tokens_of

from texts import CHAT_TEMPLATE, byte_tokenizer, character_tokenizer, conversation, says


CHARACTERS = character_tokenizer()
TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=91), max_size=12) | st.sampled_from(
    # Texts that the template holds as well.
    ["USER", "<USER>", "BE KIND", "</S>", "S", "<S>BE KIND</S>"]
)
MESSAGES = st.lists(st.builds(says, st.sampled_from(["system", "user", "assistant"]), TEXTS), min_size=1, max_size=5)


def counted_text(messages, tokenizer, assistant_only=False):
    tokens, counted = tokens_of(messages, tokenizer, assistant_only)
    assert len(tokens) == len(counted)
    return tokenizer.decode([token for token, count in zip(tokens, counted, strict=True) if count])


@settings(deadline=None)
@given(MESSAGES)
def test_what_was_said_counts_and_the_template_does_not(messages):
    tokens, _ = tokens_of(messages, CHARACTERS, False)
    assert tokens == CHARACTERS.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert counted_text(messages, CHARACTERS) == "".join(message["content"] for message in messages)
    answers = "".join(message["content"] for message in messages if message["role"] == "assistant")
    assert counted_text(messages, CHARACTERS, assistant_only=True) == answers


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim"), "HI TO\nYOU THERE"),
        # Reads a message twice, and leaves one out.
        ("{{ messages[0]['content'] }}-{{ messages[0]['content'] }}", "  HI TO\nYOU \n  HI TO\nYOU \n"),
    ],
)
def test_templates_may_trim_repeat_and_leave_out(template, expected):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    counted = counted_text(conversation("  HI TO\nYOU \n", " THERE"), tokenizer)
    # A trimmed text is joined here without what stood between.
    assert counted.replace(" ", "") == expected.replace(" ", "")


def test_tokens_of_several_characters_and_characters_of_several_tokens_count_by_their_place():
    messages = conversation("a line\n\n\n\n another", "née 漢字 🙂")
    assert counted_text(messages, byte_tokenizer()) == "a line\n\n\n\n anothernée 漢字 🙂"
