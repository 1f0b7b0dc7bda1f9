"""Which output a label belongs to is found by what the loss of the model reads, whatever the model is called."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peft_sparse import perplexity
from peft_sparse.calibration.gradients import gradient_sums
from peft_sparse.calibration.label_positions import label_offset
from peft_sparse.model.blocks import prunable_weights

from conftest import SIZES, VOCABULARY, tiny


class Plain(nn.Module):
    """A model of no library, whose loss compares labels with the outputs `offset` positions before them."""

    def __init__(self, offset, classes=VOCABULARY, loss="mean", constant=0.0):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, classes)
        self.offset, self.loss, self.constant, self.runs = offset, loss, constant, 0

    def forward(self, input_ids, labels):
        self.runs += 1
        logits = self.head(self.embed(input_ids))
        read, wanted = logits[:, : logits.shape[1] - self.offset], labels[:, self.offset :]
        costs = nn.functional.cross_entropy(read.transpose(1, 2), wanted, reduction="none")
        if self.loss == "focal":
            costs = (1 - (-costs).exp()) ** 2 * costs
        elif self.loss == "smoothed":
            smoothed = nn.functional.cross_entropy(read.transpose(1, 2), wanted, reduction="none", label_smoothing=0.2)
            costs = smoothed.masked_fill(wanted == -100, 0)
        loss = costs.sum() / (wanted != -100).sum() if self.loss == "mean" else costs.sum() / 1000
        return {"loss": loss + self.constant * logits.square().mean(), "logits": logits}


def offset_of(model, batch):
    def loss_of(inputs):
        outputs = model(**inputs)
        return outputs["loss"], outputs

    return label_offset(loss_of, batch, type(model).__name__, "Do this.")


def prompted(sequences=4, length=8):
    """Token ids whose first half has no label."""
    tokens = torch.randint(3, VOCABULARY, (sequences, length))
    labels = tokens.clone()
    labels[:, : length // 2] = -100
    return {"input_ids": tokens, "labels": labels}


class MyOwn(transformers.LlamaForCausalLM):
    pass


BERT = transformers.BertConfig(**SIZES, intermediate_size=24, max_position_embeddings=64)
BART = {"d_model": 16, "decoder_layers": 1, "decoder_ffn_dim": 24, "decoder_attention_heads": 4}
MODELS = {
    "llama": (lambda: tiny("llama"), 1),
    "gpt2": (lambda: tiny("gpt2"), 1),
    "mixtral": (lambda: tiny("mixtral"), 1),
    "a subclass": (lambda: MyOwn(tiny("llama").config), 1),
    "a causal BERT": (lambda: transformers.BertLMHeadModel(BERT), 1),
    "a masked language model": (lambda: transformers.BertForMaskedLM(BERT), 0),
    "a decoder that does not shift": (
        lambda: transformers.BartForCausalLM(transformers.BartConfig(vocab_size=VOCABULARY, encoder_layers=1, **BART)),
        0,
    ),
    "t5": (lambda: tiny("t5"), 0),
    "bart": (lambda: tiny("bart"), 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_models_of_transformers(kind, dtype):
    make, expected = MODELS[kind]
    assert offset_of(make().eval().to(dtype), prompted()) == expected


@given(
    st.sampled_from([0, 1]),
    st.integers(2, 40),
    st.sampled_from(["mean", "sum", "focal", "smoothed"]),
    st.sampled_from([0.0, 100.0]),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_any_loss_that_falls_with_the_probability_of_the_label(offset, classes, loss, constant, seed):
    torch.manual_seed(seed)
    batch = {"input_ids": torch.randint(0, VOCABULARY, (3, 9)), "labels": torch.randint(0, classes, (3, 9))}
    before = {name: value.clone() for name, value in batch.items()}
    assert offset_of(Plain(offset, classes, loss, constant), batch) == offset
    assert all(torch.equal(batch[name], value) for name, value in before.items())


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("labelled", [True, False])
def test_short_sequences_and_batches_without_labels(offset, length, labelled):
    tokens = torch.randint(0, VOCABULARY, (2, length))
    labels = tokens if labelled else torch.full_like(tokens, -100)
    model, long = Plain(offset), Plain(offset)
    assert offset_of(model, {"input_ids": tokens, "labels": labels}) == offset
    # Processes with other batches run the model as often.
    offset_of(long, prompted())
    assert model.runs == long.runs


def test_classes_that_are_ruled_out_are_not_tried():
    model = Plain(1)
    model.head.bias.data[7:] = -1e6
    assert offset_of(model, {"input_ids": torch.randint(0, 7, (2, 9)), "labels": torch.randint(0, 7, (2, 9))}) == 1


def test_one_label_for_a_sequence_needs_no_trial():
    model = tiny("vit")
    batch = {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([1, 0])}
    assert offset_of(model, batch) == 0


UNSHIFTED, MASKED = MODELS["a decoder that does not shift"][0], MODELS["a masked language model"][0]


def shifted(tokens):
    return nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)


def test_perplexity_compares_labels_as_the_loss_of_the_model_does():
    tokens = torch.randint(3, VOCABULARY, (4, 8))
    decoder = UNSHIFTED().eval()
    expected = decoder(input_ids=tokens, labels=shifted(tokens)).loss.exp().item()
    # Token ids alone, labels that are the tokens, and labels as this model's loss takes them.
    for labels in ({}, {"labels": tokens}, {"labels": shifted(tokens)}):
        assert perplexity(decoder, [{"input_ids": tokens} | labels]) == pytest.approx(expected, rel=1e-5)
    model, labels = MASKED().eval(), torch.where(torch.rand(4, 8) < 0.3, tokens, -100)
    masked = tokens.masked_fill(labels != -100, 1)
    for mask in (torch.ones(4, 8).long(), torch.ones(4, 8).long().index_fill(1, torch.tensor([0, 1]), 0)):
        batch = {"input_ids": masked, "attention_mask": mask}
        counted = labels.masked_fill(mask == 0, -100)
        expected = model(**batch, labels=counted).loss.exp().item()
        assert perplexity(model, [batch | {"labels": labels}]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "labels_of"),
    [(lambda: tiny("llama"), lambda t: t), (UNSHIFTED, shifted), (MASKED, lambda t: t)],
    ids=["a causal model", "a decoder that does not shift", "a masked language model"],
)
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_are_those_of_the_task_that_the_model_learned(make, labels_of, padded):
    model = make().eval()
    batch = {"input_ids": torch.randint(3, VOCABULARY, (3, 8)), "attention_mask": torch.ones(3, 8).long()}
    if padded:
        batch["attention_mask"][:, 6:] = 0
    tokens = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    # A decoder alone does not use its attention to an encoder.
    weights = {name: weight for name, weight in prunable_weights(model).items() if "encoder_attn" not in name}
    found = gradient_sums(model, weights, [batch])
    expected = gradient_sums(model, weights, [batch | {"labels": labels_of(tokens)}])
    for name, sums in expected.items():
        torch.testing.assert_close(found[name], sums)
