import math

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from torch import nn

from peft_sparse import MaskLoRAConfig, perplexity

from conftest import VOCABULARY, inputs_of, tiny


LENGTHS = [12, 7, 2, 9, 11, 5]


def by_hand(model, batches):
    """exp of the mean loss of single sequences without padding, weighed by the number of predicted tokens."""
    losses, counts = [], []
    with torch.no_grad():
        for batch in batches:
            predicted = batch["labels"] if model.config.is_encoder_decoder else batch["labels"][:, 1:]
            counts.append(int(predicted.ne(-100).sum()))
            losses.append(float(model(**batch).loss) * counts[-1])
    return math.exp(sum(losses) / sum(counts))


def padded(rows, side, dtype=torch.long):
    """The first tokens of each row, as many as `LENGTHS` says, moved to the other end of `side`; and their mask."""
    tokens, mask = torch.full_like(rows, 5), torch.zeros(rows.shape, dtype=dtype)
    for row, size, target, kept in zip(rows, LENGTHS, tokens, mask, strict=True):
        place = slice(0, size) if side == "right" else slice(len(row) - size, None)
        target[place], kept[place] = row[:size], 1
    return tokens, mask


def test_token_ids_are_counted_from_the_second_token_on(model, tokens):
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    assert perplexity(model, tokens, batch_size=6) == pytest.approx(math.exp(loss), rel=1e-6)
    assert perplexity(model, tokens.int(), batch_size=6) == perplexity(model, tokens, batch_size=6)


@pytest.mark.parametrize("batch_size", [1, 4, 6])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_batches_do_not_matter(family, batch_size, tokens):
    model = tiny(family)
    expected = perplexity(model, tokens)
    assert perplexity(model, tokens, batch_size) == pytest.approx(expected, rel=1e-5)
    names = ["input_ids", "decoder_input_ids"][: 2 if family == "t5" else 1]
    batches = (dict.fromkeys(names, rows) for rows in tokens.split(batch_size))
    assert perplexity(model, batches) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_padding_is_not_counted(llama, tokens, side, with_labels, dtype):
    alone = [row[None, :size] for row, size in zip(tokens, LENGTHS, strict=True)]
    expected = by_hand(llama, [{"input_ids": row, "labels": row} for row in alone])
    ids, mask = padded(tokens, side, dtype)
    batch = {"input_ids": ids, "attention_mask": mask} | ({"labels": ids} if with_labels else {})
    before = mask.clone()
    assert perplexity(llama, [batch]) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(mask, before)


def test_labels_of_minus_100_are_not_counted(llama, tokens):
    labels = tokens.masked_fill(torch.rand(tokens.shape) < 0.4, -100)
    singles = [{"input_ids": a[None], "labels": b[None]} for a, b in zip(tokens, labels, strict=True)]
    expected = by_hand(llama, singles)
    assert perplexity(llama, [{"input_ids": tokens, "labels": labels}]) == pytest.approx(expected, rel=1e-5)
    # A batch without any label counts for nothing.
    idle = {"input_ids": tokens, "labels": torch.full_like(tokens, -100)}
    assert perplexity(llama, [*singles, idle]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("given", ["labels", "decoder_input_ids", "both"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_predicts_its_labels(family, given):
    """Padded on both sides, by masks, and by labels of -100 where labels are given."""
    model, batch = tiny(family), inputs_of(family)
    targets = torch.randint(0, VOCABULARY, (6, 12))
    encoder, encoder_mask = padded(batch["input_ids"], "right")
    decoder, decoder_mask = padded(targets, "right")
    inputs = {"input_ids": encoder, "attention_mask": encoder_mask}
    labels = decoder.masked_fill(decoder_mask == 0, -100)
    if given != "labels":
        inputs |= {"decoder_input_ids": decoder, "decoder_attention_mask": decoder_mask}
    if given != "decoder_input_ids":
        inputs["labels"] = labels if given == "labels" else decoder
    singles = []
    for row, target, size in zip(batch["input_ids"], targets, LENGTHS, strict=True):
        single = {"input_ids": row[None, :size], "labels": target[None, :size]}
        if given != "labels":
            single["decoder_input_ids"] = target[None, :size]
        if given == "decoder_input_ids":
            single["labels"] = nn.functional.pad(target[None, 1:size], (0, 1), value=-100)
        singles.append(single)
    assert perplexity(model, [inputs]) == pytest.approx(by_hand(model, singles), rel=1e-5)


def test_the_model_is_left_as_it_was(llama, tokens):
    model = get_peft_model(llama, MaskLoRAConfig(target_modules="all-linear", lora_dropout=0)).train()
    modes = [module.training for module in model.modules()]
    batch = {"input_ids": tokens, "labels": tokens}
    assert perplexity(model, [batch]) == pytest.approx(perplexity(tiny("llama"), tokens), rel=1e-5)
    assert [module.training for module in model.modules()] == modes
    assert list(batch) == ["input_ids", "labels"]
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_loss_beyond_the_range_of_floats_is_an_infinite_perplexity(llama, tokens):
    with torch.no_grad():
        llama.lm_head.weight.mul_(1e6)
    assert perplexity(llama, tokens) == float("inf")


def test_an_offloaded_model_is_measured_as_one_in_memory(llama, tokens):
    expected = perplexity(llama, tokens)
    assert perplexity(cpu_offload(tiny("llama")), tokens) == expected
