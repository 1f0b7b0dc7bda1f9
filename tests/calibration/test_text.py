import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from peft_sparse import pack_sequences, sample_sequences


def make_tokenizer():
    """A byte-level BPE like that of GPT-2 and Llama 3, which begins every text with a special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a line\n\n\n\n another line\n\n\n and a third\n\n"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=8)


TOKENIZER = make_tokenizer()


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
