import itertools
import math
import random

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_sparse import SparseTrainer, pack_sequences, perplexity, prune, sample_sequences

from texts import byte_tokenizer, character_tokenizer, conversation
from trainers import arguments


TOKENIZER = byte_tokenizer()


class Words:
    """Numbers are their own tokens, so that every token tells where it stood."""

    def __call__(self, text, **options):
        return {"input_ids": [int(word) for word in text.split()]}


def document(number: int, size: int) -> str:
    return " ".join(str(1000 * number + position) for position in range(size))


SIZES = [3, 9, 4, 5, 30, 6, 12, 5, 8, 7]
DOCUMENTS = [document(number, size) for number, size in enumerate(SIZES)]


# -- windows for calibration ------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 10))
def test_each_window_lies_in_a_document_of_its_own_that_is_longer(count, seed):
    windows = sample_sequences(DOCUMENTS, Words(), count, length=5, seed=seed)
    assert windows.shape == (count, 5)
    assert windows.dtype == torch.int64
    numbers = [int(row[0]) // 1000 for row in windows]
    assert len(set(numbers)) == count
    for number, row in zip(numbers, windows, strict=True):
        assert SIZES[number] > 5
        first = int(row[0]) % 1000
        assert row.tolist() == [1000 * number + first + i for i in range(5)]
        assert first + 5 <= SIZES[number]


def test_windows_begin_anywhere():
    starts = {int(sample_sequences([document(0, 9)], Words(), 1, length=5, seed=seed)[0, 0]) for seed in range(60)}
    # As in the papers' scripts, the last window of a document is never drawn.
    assert starts == {0, 1, 2, 3}


def test_windows_repeat_with_the_seed_and_leave_other_generators_alone():
    random.seed(1)
    before = random.getstate()
    one, same, other = (sample_sequences(iter(DOCUMENTS), Words(), 4, length=5, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert random.getstate() == before


def test_sequences_have_2048_tokens_by_default():
    windows = sample_sequences([document(0, 2049)], Words(), 1)
    assert windows.shape == (1, 2048)
    assert pack_sequences([document(0, 5000)], Words()).shape == (2, 2048)


# -- several sources --------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abcde"), st.integers(1, 9), min_size=1), st.integers(45, 70))
def test_shares_are_exact_by_largest_remainder(shares, count):
    sources = {name: [document(ord(name), 3)] * 70 for name in shares}
    windows = sample_sequences(sources, Words(), count, length=2, shares=shares)
    assert len(windows) == count
    for name, share in shares.items():
        found = int((windows[:, 0] // 1000 == ord(name)).sum())
        assert abs(found - count * share / sum(shares.values())) < 1


def test_the_largest_remainders_get_what_is_left():
    sources = {name: [document(ord(name), 3)] * 9 for name in "abc"}
    windows = sample_sequences(sources, Words(), 10, length=2, shares={"a": 0.47, "b": 0.38, "c": 0.15})
    assert (windows[:, 0] // 1000 - ord("a")).bincount().tolist() == [5, 4, 1]


def test_each_source_gives_what_it_alone_would_give():
    own = torch.arange(40).view(4, 10)
    windows = sample_sequences({"c4": DOCUMENTS, "own": own}, Words(), 5, 5, seed=3, shares={"own": 2, "c4": 3})
    alone = sample_sequences(DOCUMENTS, Words(), 3, 5, seed=3), sample_sequences(own, Words(), 2, 5, seed=3)
    assert torch.equal(windows, torch.cat(alone))
    assert {tuple(row.tolist()) for row in alone[1]} <= {
        tuple(range(10 * row + start, 10 * row + start + 5)) for row in range(4) for start in range(6)
    }


def test_sequences_of_the_right_length_are_drawn_as_they_are():
    own = torch.arange(40).view(8, 5)
    assert sorted(sample_sequences(own, Words(), 8, 5).tolist()) == own.tolist()


def test_a_data_set_gives_the_windows_of_its_texts():
    dataset = Dataset.from_dict({"text": DOCUMENTS, "url": ["a"] * len(DOCUMENTS)})
    expected = sample_sequences(DOCUMENTS, Words(), 4, 5)
    assert torch.equal(sample_sequences(dataset, Words(), 4, 5), expected)
    assert torch.equal(sample_sequences(dataset["text"], Words(), 4, 5), expected)
    tokenized = dataset.map(lambda row: Words()(row["text"]))
    assert sample_sequences(tokenized, None, 4, 5).shape == (4, 5)
    assert torch.equal(pack_sequences(dataset, Words(), 5), pack_sequences(DOCUMENTS, Words(), 5))


@pytest.mark.parametrize("kind", ["generator", "datasets"])
def test_a_stream_is_shuffled_and_not_read_to_its_end(kind):
    read = []

    def rows():
        for number in itertools.count():
            read.append(number)
            yield {"text": document(number, 6)}

    def stream():
        return rows() if kind == "generator" else IterableDataset.from_generator(rows)

    one, same, other = (sample_sequences(stream(), Words(), 4, length=5, seed=seed) for seed in (0, 0, 1))
    assert len(read) < 3 * 1100
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert max(one[:, 0] // 1000) > 20


# -- conversations ----------------------------------------------------------------------------------------------------

CHATS = [conversation(f"WHAT IS {number}?", "A NUMBER." * (1 + number % 3)) for number in range(40)]
CHARACTERS = character_tokenizer()


def test_conversations_follow_each_other_without_padding():
    rows = sample_sequences(CHATS, CHARACTERS, 5, length=90)
    written = [CHARACTERS.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    found = [CHARACTERS.decode(row["input_ids"]) for row in rows]
    assert all(len(text) == 90 and text.startswith("<S>BE KIND</S><USER>WHAT") for text in found)
    begun = [chat for text in found for chat in text.replace("</S><S>", "</S>\n<S>").split("\n")]
    assert all(any(whole.startswith(chat) for whole in written) for chat in begun)
    assert len(begun) > 5
    complete = [chat for chat in begun if chat in written]
    assert len(set(complete)) == len(complete) > 2, "no conversation twice"


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_conversations_may_be_a_column_of_a_data_set(column):
    dataset = Dataset.from_dict({column: CHATS, "id": range(40)})
    for row, expected in zip(
        sample_sequences(dataset, CHARACTERS, 5, 90), sample_sequences(CHATS, CHARACTERS, 5, 90), strict=True
    ):
        assert all(torch.equal(row[name], expected[name]) for name in ("input_ids", "labels", "token_mask"))


def test_a_mix_of_texts_and_conversations_says_what_counts():
    sources = {"text": ["SOME TEXT. " * 20] * 3, "chat": CHATS}
    rows = sample_sequences(sources, CHARACTERS, 4, 90, shares={"text": 1, "chat": 1})
    assert [int(row["token_mask"].sum()) == 90 for row in rows] == [True, True, False, False]
    for row in rows:
        assert torch.equal(row["labels"], row["input_ids"].masked_fill(row["token_mask"] == 0, -100))
    # Drawn again, as a source, they keep their masks.
    again = sample_sequences(rows, CHARACTERS, 4, 90)
    key = lambda row: (row["input_ids"].tolist(), row["token_mask"].tolist())  # noqa: E731
    assert sorted(map(key, again)) == sorted(map(key, rows))


def test_pruning_evaluation_and_training_take_what_is_returned(llama, tmp_path):
    rows = sample_sequences(CHATS, CHARACTERS, 6, 60)
    stacked = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "token_mask")}
    assert perplexity(llama, rows) == pytest.approx(perplexity(llama, stacked), rel=1e-5)
    assert prune(llama, 0.5, rows, criterion="wanda").sparsity == pytest.approx(0.5, abs=0.01)
    SparseTrainer(llama, arguments(tmp_path, max_steps=2), train_dataset=rows).train()


# -- packed text ------------------------------------------------------------------------------------------------------

WIKITEXT = ["", " = A title = \n", "", " A paragraph of a third line .\n", "", "", " = = Next = = \n", " and more .\n"]


@pytest.mark.parametrize("separator", ["\n\n", " ", ""])
@pytest.mark.parametrize("length", [1, 3, 7])
def test_packed_sequences_are_the_tokens_of_the_joined_text(separator, length):
    tokens = TOKENIZER(separator.join(WIKITEXT), verbose=False)["input_ids"]
    packed = pack_sequences(iter(WIKITEXT), TOKENIZER, length, separator=separator)
    assert packed.flatten().tolist() == tokens[: len(tokens) // length * length]
    assert packed.shape == (len(tokens) // length, length)
    assert (packed == 0).sum() == 1, "one special token, at the very beginning"


def test_joining_makes_other_tokens_than_one_text_after_the_other():
    """Else the test above could not fail."""
    apart = [token for text in WIKITEXT for token in TOKENIZER(text + "\n\n", add_special_tokens=False)["input_ids"]]
    assert pack_sequences(WIKITEXT, TOKENIZER, 1).flatten().tolist()[1:] != apart


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(1, 8))
def test_only_the_tail_is_dropped(sizes, length):
    total = sum(sizes)
    texts = [document(number, size) for number, size in enumerate(sizes)]
    if total < length:
        with pytest.raises(ValueError, match=f"at least one sequence of {length} tokens, got {total} tokens"):
            pack_sequences(texts, Words(), length)
        return
    packed = pack_sequences(texts, Words(), length)
    expected = [1000 * number + i for number, size in enumerate(sizes) for i in range(size)]
    assert packed.flatten().tolist() == expected[: math.floor(total / length) * length]


def test_one_text_is_one_document():
    assert pack_sequences("1 2 3 4", Words(), 2).tolist() == [[1, 2], [3, 4]]
