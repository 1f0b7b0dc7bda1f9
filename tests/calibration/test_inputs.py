"""Calibration data in the forms in which users have it, and what of it reaches the model."""

import copy

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from peft_sparse import Criterion, Fit, perplexity, prune, reconstruct
from peft_sparse.calibration import inputs
from peft_sparse.calibration.inputs import as_inputs, fingerprint_of_inputs, labels_of, model_arguments, sequences_in

from checks import assert_same_weights
from conftest import ENCODER_DECODERS, VOCABULARY, tiny


TOKENS = torch.randint(2, 61, (4, 12), generator=torch.Generator().manual_seed(3))
ONES = torch.ones_like(TOKENS)
TARGET = TOKENS.masked_fill(torch.arange(12) < 11, -100)
RAGGED = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


def dataset(**columns):
    return Dataset.from_dict({"input_ids": TOKENS.tolist(), **columns})


def in_inference_mode():
    with torch.inference_mode():
        return TOKENS.clone()


FORMS = {
    "token ids": lambda: TOKENS,
    "an array": TOKENS.numpy,
    "all that a tokenizer returns": lambda: {
        "input_ids": TOKENS,
        "special_tokens_mask": 1 - ONES,
        "offset_mapping": torch.zeros(4, 12, 2).long(),
        "overflow_to_sample_mapping": torch.arange(4),
        "length": torch.full((4,), 12),
    },  # fmt: skip
    "a tokenizer's output": lambda: transformers.BatchEncoding({"input_ids": TOKENS, "attention_mask": ONES}),
    "a tokenizer's lists": lambda: transformers.BatchEncoding({"input_ids": TOKENS.tolist()}),
    "a tokenizer's arrays": lambda: {"input_ids": TOKENS.numpy(), "attention_mask": np.ones((4, 12))},
    "lists of ids": TOKENS.tolist,
    "a list of (n,)": lambda: list(TOKENS),
    "a list of (1, n)": lambda: list(TOKENS.split(1)),
    "a list of batches": lambda: list(TOKENS.split(2)),
    "a list of rows": lambda: [{"input_ids": row.tolist()} for row in TOKENS],
    "pairs of Wanda's loaders": lambda: list(zip(TOKENS.split(1), TARGET.split(1), strict=True)),
    "a data set": lambda: dataset(text=list("abcd"), idx=[0, 1, 2, 3]),
    "a data set of tensors": lambda: dataset(idx=[0, 1, 2, 3]).with_format("torch"),
    "a data set of (1, n)": lambda: Dataset.from_dict({"input_ids": [[row] for row in TOKENS.tolist()]}),
    "a torch data set": lambda: TensorDataset(TOKENS),
    "a loader of tuples": lambda: DataLoader(TensorDataset(TOKENS), batch_size=2),
    "a loader of pairs": lambda: DataLoader(TensorDataset(TOKENS, TARGET), batch_size=2),
    "a loader of dicts": lambda: DataLoader(dataset().with_format("torch"), batch_size=3),
    "a loader of dicts of lists": lambda: DataLoader(dataset(text=list("abcd")), batch_size=2),
    "a loader of lists": lambda: DataLoader(TOKENS.tolist(), batch_size=2),
    "a generator": lambda: ({"input_ids": row[None]} for row in TOKENS),
    "tensors of inference mode": in_inference_mode,
}


@pytest.fixture(scope="module")
def by_tensor():
    pruned = tiny("llama")
    prune(pruned, 0.5, TOKENS, criterion="wanda")
    return pruned


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_zeros_of_its_tokens(form, llama, by_tensor):
    prune(llama, 0.5, FORMS[form](), criterion="wanda", batch_size=2)
    assert_same_weights(llama, by_tensor)


def test_sequences_run_together_in_batches(llama):
    for form in ("token ids", "a tokenizer's output", "a list of (n,)", "a list of (1, n)", "a data set"):
        assert [sequences_in(batch) for batch in as_inputs(llama, FORMS[form](), 3)] == [3, 1], form


def sizes(model, data):
    return [sequences_in(batch) for batch in as_inputs(model, data, None)]


def test_by_default_as_many_of_one_length_run_together_as_have_256_tokens(llama):
    def tokens(count, length):
        return torch.randint(0, VOCABULARY, (count, length))

    assert sizes(llama, tokens(5, 128)) == [2, 2, 1]
    assert sizes(llama, tokens(3, 129)) == sizes(llama, tokens(3, 2048)) == [1, 1, 1]
    assert sizes(llama, {"input_ids": tokens(5, 100), "attention_mask": torch.ones(5, 100)}) == [2, 2, 1]
    rows = [torch.ones(length, dtype=torch.long) for length in (64, 64, 64, 64, 64, 100, 100, 99, 256, 300, 300)]
    assert sizes(llama, rows) == [4, 1, 2, 1, 1, 1, 1]
    assert sizes(llama, Dataset.from_dict({"input_ids": [row.tolist() for row in rows]})) == [4, 1, 2, 1, 1, 1, 1]


def test_by_default_nothing_is_padded_and_what_has_padding_or_images_runs_alone(llama):
    ids, mask = torch.ones(3, 12, dtype=torch.long), torch.ones(3, 12, dtype=torch.long)
    mask[2, 5:] = 0
    rows = [{"input_ids": row, "attention_mask": counts} for row, counts in zip(ids, mask, strict=True)]
    assert sizes(llama, {"input_ids": ids, "attention_mask": mask}) == [1, 1, 1]
    assert sizes(llama, rows) == [2, 1]
    assert sizes(llama, {"input_ids": ids, "pixel_values": torch.ones(3, 3, 8, 8)}) == [1, 1, 1]
    assert sizes(tiny("vit"), torch.ones(3, 3, 8, 8)) == [1, 1, 1]


def test_by_default_processes_have_a_batch_for_each_sequence(llama, monkeypatch):
    monkeypatch.setattr(inputs, "place", lambda: (0, 2))
    assert sizes(llama, torch.ones(3, 12, dtype=torch.long)) == [1, 1, 1]


def test_batches_stay_as_they_are(llama):
    batches = [{"input_ids": TOKENS, "attention_mask": ONES}, {"input_ids": TOKENS[:1]}]
    assert as_inputs(llama, iter(batches), 1) == batches


@settings(deadline=None, max_examples=20)
@given(st.lists(st.lists(st.integers(2, 60), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(1, 3))
def test_sequences_of_different_lengths_are_padded_to_the_longest_of_their_batch(sequences, batch_size):
    model = tiny("llama")
    for data in (sequences, [torch.tensor(s) for s in sequences], {"input_ids": sequences}):
        batches = as_inputs(model, data, batch_size)
        kept = [
            [int(token) for token, counts in zip(row, mask, strict=True) if counts]
            for batch in batches
            for row, mask in zip(
                batch["input_ids"], batch.get("attention_mask", torch.ones_like(batch["input_ids"])), strict=True
            )
        ]
        assert kept == sequences
        for batch, start in zip(batches, range(0, len(sequences), batch_size), strict=True):
            assert batch["input_ids"].shape[1] == max(map(len, sequences[start : start + batch_size]))


def test_masks_and_labels_are_padded_with_their_tokens(llama):
    rows = [{"input_ids": ids, "labels": ids, "token_mask": [0] + [1] * (len(ids) - 1)} for ids in RAGGED]
    (batch,) = as_inputs(llama, rows, 3)
    assert batch["labels"].tolist() == [[5, 6, 7, -100], [8, 9, -100, -100], [10, 11, 12, 13]]
    assert batch["token_mask"].tolist() == [[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


def test_labels_of_an_encoder_decoder_are_padded_by_themselves():
    rows = [{"input_ids": ids, "labels": ids[:size]} for ids, size in zip(RAGGED, (1, 2, 1), strict=True)]
    (batch,) = as_inputs(tiny("t5"), rows, 3)
    assert batch["labels"].tolist() == [[5, -100], [8, 9], [10, -100]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 0], [1, 1], [1, 0]]
    assert "decoder_input_ids" not in batch


def test_sequences_that_no_mask_can_describe_run_alone():
    class Unmasked(nn.Module):
        def forward(self, input_ids):
            return input_ids

    assert [b["input_ids"].tolist() for b in as_inputs(Unmasked(), RAGGED, 3)] == [[row] for row in RAGGED]


def test_one_dict_that_holds_more_than_sequences_is_one_batch(llama):
    flat = {"input_ids": TOKENS, "pixel_values": torch.ones(9, 5)}
    assert as_inputs(llama, flat, 1) == [flat]
    positions = {"input_ids": TOKENS[:3], "position_ids": torch.ones(3, 3, 12)}
    assert as_inputs(llama, positions, 1) == [positions]


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_tokens_go_to_both_sides_of_an_encoder_decoder(family, tokens):
    model = tiny(family)
    assert list(as_inputs(model, tokens)[0]) == ["input_ids", "decoder_input_ids"]
    by_tensor, by_batch, by_dict = tiny(family), tiny(family), tiny(family)
    prune(by_tensor, 0.5, criterion="wanda", calibration=tokens, batch_size=6)
    prune(by_batch, 0.5, criterion="wanda", calibration=[{"input_ids": tokens, "decoder_input_ids": tokens}])
    prune(by_dict, 0.5, criterion="wanda", calibration={"input_ids": tokens}, batch_size=6)
    assert_same_weights(by_tensor, by_batch)
    assert_same_weights(by_tensor, by_dict)


def test_images_come_as_loaders_of_images_give_them():
    images, classes = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])
    by_dict, by_loader = tiny("vit"), tiny("vit")
    prune(by_dict, 0.5, [{"pixel_values": images}], criterion="wanda")
    prune(by_loader, 0.5, DataLoader(TensorDataset(images, classes), batch_size=4), criterion="wanda")
    assert_same_weights(by_dict, by_loader)
    assert [b["pixel_values"].shape[0] for b in as_inputs(by_dict, TensorDataset(images, classes), 3)] == [3, 1]


def test_empty_rows_of_a_data_set_are_left_out(llama):
    data = Dataset.from_dict({"input_ids": [[], [5, 6], []]})
    assert [batch["input_ids"].tolist() for batch in as_inputs(llama, data)] == [[[5, 6]]]


# -- what reaches the model -------------------------------------------------------------------------------------------


def test_a_mask_that_the_model_does_not_take_still_describes_the_tokens_of_a_data_set():
    class Unmasked(nn.Module):
        def forward(self, input_ids):
            return input_ids

    data = Dataset.from_dict({"input_ids": [[1, 2]], "attention_mask": [[1, 0]]})
    (batch,) = as_inputs(Unmasked(), data)
    assert batch["token_mask"].tolist() == [[1, 0]]
    assert list(model_arguments(Unmasked(), batch)) == ["input_ids"]


def test_token_masks_and_caches_do_not_reach_the_model(llama):
    batch = {"input_ids": TOKENS, "token_mask": ONES, "decoder_token_mask": ONES, "use_cache": True}
    assert model_arguments(llama, batch) == {"input_ids": TOKENS, "use_cache": False}
    assert model_arguments(nn.Linear(2, 2), {"input": TOKENS}) == {"input": TOKENS}


def test_a_cache_in_a_batch_is_not_written_to(llama):
    prefix = transformers.DynamicCache(config=llama.config)
    llama(input_ids=TOKENS[:, :4], past_key_values=prefix)
    batch = {"input_ids": TOKENS[:, 4:], "past_key_values": prefix}
    whole = llama(input_ids=TOKENS, use_cache=False).logits[:, 4:]
    for _ in range(2):
        torch.testing.assert_close(llama(**model_arguments(llama, batch)).logits, whole)
    assert prefix.get_seq_length() == 4


def test_tokens_after_a_prefix_are_measured_as_those_of_the_whole_sequence(llama):
    def norms(model, batch):
        found = []

        def score(weight, statistics):
            found.append(statistics.input_norm)
            return weight.abs()

        # Nothing is pruned, so that all blocks are measured on the dense model.
        prune(model, 0.0, [batch], criterion=Criterion(score, group="row", needs=("inputs",)))
        return found

    prefix = transformers.DynamicCache(config=llama.config)
    llama(input_ids=TOKENS[:, :4], past_key_values=prefix)
    mask = (torch.arange(12) > 3).expand(4, 12)
    expected = norms(tiny("llama"), {"input_ids": TOKENS, "token_mask": mask})
    batch = {"input_ids": TOKENS[:, 4:], "past_key_values": prefix}
    for norm, whole in zip(norms(llama, batch), expected, strict=True):
        torch.testing.assert_close(norm, whole)
    report = reconstruct(llama, 0.5, [batch], criterion="wanda", fit=Fit(max_steps=2))
    assert all(region.error <= region.error_pruned for region in report.regions)
    assert prefix.get_seq_length() == 4


def test_the_hash_of_inputs_is_that_of_the_tensors_in_a_cache(llama):
    def batch(tokens):
        cache = transformers.DynamicCache(config=llama.config)
        llama(input_ids=tokens, past_key_values=cache)
        return [{"input_ids": TOKENS, "past_key_values": cache}]

    assert fingerprint_of_inputs(batch(TOKENS)) == fingerprint_of_inputs(batch(TOKENS))
    assert fingerprint_of_inputs(batch(TOKENS)) != fingerprint_of_inputs(batch(TOKENS.flip(0)))


# -- the loss of tokens that count ------------------------------------------------------------------------------------


def test_labels_leave_out_what_a_token_mask_leaves_out():
    mask = (torch.arange(12) > 3).expand(4, 12)
    assert torch.equal(labels_of({"input_ids": TOKENS, "token_mask": mask}), TOKENS.masked_fill(~mask, -100))
    labels = labels_of({"decoder_input_ids": TOKENS, "decoder_token_mask": mask})
    assert torch.equal(labels[:, :3], torch.full((4, 3), -100))
    assert torch.equal(labels[:, 3:-1], TOKENS[:, 4:])


def test_gradients_and_perplexity_are_of_the_tokens_that_count(llama):
    mask = (torch.arange(12) > 3).expand(4, 12)
    labels = TOKENS.masked_fill(~mask, -100)
    by_mask, by_labels, by_both = ({"input_ids": TOKENS, **more} for more in (
        {"token_mask": mask}, {"labels": labels}, {"labels": TOKENS, "token_mask": mask}
    ))  # fmt: skip
    expected = perplexity(llama, [by_labels])
    assert perplexity(llama, [by_mask]) == pytest.approx(expected)
    assert perplexity(llama, [by_both]) == pytest.approx(expected)
    found = []

    def score(weight, statistics):
        found[-1].append(statistics.gradient)
        return weight.abs()

    for batch in (by_labels, by_mask, by_both):
        found.append([])
        prune(copy.deepcopy(llama), 0.5, [batch], criterion=Criterion(score, group="row", needs=("gradients",)))
    for reference, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(other, reference)
