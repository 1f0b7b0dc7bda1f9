"""Padding never counts: what is measured on padded sequences is what is measured on each sequence alone."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import nn

from peft_sparse import prune
from peft_sparse.calibration.padding import align
from peft_sparse.model.blocks import prunable_weights

from conftest import tiny


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def statistics(model, batches, **options):
    """What is measured for every weight, by name."""
    found, names = {}, {}
    for name, weight in prunable_weights(model).items():
        names[weight.matrix().flatten()[:4].tolist().__repr__()] = name

    def keep(weight, measured):
        found[names[repr(weight.flatten()[:4].tolist())]] = measured
        return weight.abs()

    prune(model, 0.0, batches, criterion=keep, **options)
    return found


def assert_same_statistics(model, one, other, **options):
    expected, found = statistics(model, one, **options), statistics(model, other, **options)
    assert expected.keys() == found.keys()
    for name, measured in expected.items():
        assert found[name].tokens == measured.tokens, name
        torch.testing.assert_close(found[name].input_norm, measured.input_norm, rtol=1e-3, atol=1e-5, msg=name)


def padded(sequences, value=0, left=False):
    """Sequences of token ids (1, n) as one batch, and its mask."""
    longest = max(s.shape[1] for s in sequences)
    sides = [(longest - s.shape[1], 0) if left else (0, longest - s.shape[1]) for s in sequences]
    ids = torch.cat([nn.functional.pad(s, side, value=value) for s, side in zip(sequences, sides, strict=True)])
    ones = [nn.functional.pad(torch.ones_like(s), side) for s, side in zip(sequences, sides, strict=True)]
    return ids, torch.cat(ones)


def texts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 32, (1, length), generator=generator) for length in lengths]


def lively(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


# -- which rows are which tokens ------------------------------------------------------------------------------------


@given(
    sequences=st.integers(2, 4), tokens=st.integers(5, 7), other=st.integers(8, 9), layout=st.sampled_from(range(6)),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_rows_are_found_in_every_layout(sequences, tokens, other, layout, seed):
    mask = torch.rand(sequences, tokens, generator=torch.Generator().manual_seed(seed)) > 0.4
    order = list(itertools.permutations(range(3)))[layout]
    labelled = mask[..., None].expand(sequences, tokens, other).permute(order)
    assert torch.equal(align(mask, labelled.shape), labelled.flatten())
    assert torch.equal(align(mask, torch.Size((mask.numel(),))), mask.flatten())
    assert torch.equal(align(mask, mask.T.shape), mask.T.flatten())
    assert align(mask, torch.Size((sequences, 97))) is None
    assert align(mask, torch.Size((97,))) is None


# -- families --------------------------------------------------------------------------------------------------------


def deberta():
    config = tf.DebertaV2Config(vocab_size=32, **SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"])
    return tf.DebertaV2Model(config)


ENCODERS = {
    "BERT": lambda: tf.BertModel(tf.BertConfig(vocab_size=32, **SIZES)),
    # Weights of relative positions get rows that are no tokens.
    "DeBERTa": deberta,
    # Sequences are the second dimension of its hidden states.
    "XLNet": lambda: tf.XLNetModel(tf.XLNetConfig(vocab_size=32, d_model=16, n_layer=2, n_head=2, d_inner=24)),
    # Pads to its window by itself.
    "Longformer": lambda: tf.LongformerModel(
        tf.LongformerConfig(vocab_size=32, **SIZES, attention_window=4, max_position_embeddings=40, pad_token_id=1)
    ),
    # Experts of attention and MLP get sorted tokens.
    "JetMoE": lambda: tf.JetMoeForCausalLM(
        tf.JetMoeConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8,
            intermediate_size=24, num_local_experts=2, num_experts_per_tok=1,
        )
    ),
    # Its experts take as many tokens as a share of all tokens, padding included.
    "NLLB-MoE": lambda: tf.NllbMoeModel(
        tf.NllbMoeConfig(
            vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_experts=2, encoder_sparse_step=1,
            decoder_sparse_step=1, max_position_embeddings=32,
        )
    ).get_encoder(),
    "Mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(vocab_size=32, **SIZES, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.filterwarnings("ignore:No calibration token reached")
def test_padded_sequences_are_measured_as_each_alone(family):
    model = lively(ENCODERS[family]())
    sequences = texts(8, 3, 5)
    ids, mask = padded(sequences, value=1)
    # Longformer uses some layers for global attention alone. Rows of relative positions are counted once per batch.
    options = {"exclude_modules": r".*(_global|pos_(key|query)_proj).*"} if family in ("Longformer", "DeBERTa") else {}
    assert_same_statistics(
        model, [{"input_ids": s} for s in sequences], [{"input_ids": ids, "attention_mask": mask}], **options
    )


def test_rows_that_are_no_tokens_and_do_not_depend_on_padding_count_whole():
    ids, mask = padded(texts(8, 3))
    found = statistics(lively(deberta()), [{"input_ids": ids, "attention_mask": mask}])
    assert found["encoder.layer.0.attention.self.pos_key_proj"].tokens == 2 * 512
    assert found["encoder.layer.0.attention.self.key_proj"].tokens == 11


def test_a_mask_over_samples_goes_through_the_models_own_reduction():
    config = tf.Wav2Vec2Config(
        **SIZES, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
    )  # fmt: skip
    long, short = torch.randn(1, 2000), torch.randn(1, 500)
    both = torch.cat([long, nn.functional.pad(short, (0, 1500))])
    batch = {"input_values": both, "attention_mask": (both != 0).long()}
    model = lively(tf.Wav2Vec2Model(config))
    found = statistics(model, [batch], target_modules=r".*layers\.0.*q_proj")
    alone = [{"input_values": long}, {"input_values": short}]
    expected = statistics(model, alone, target_modules=r".*layers\.0.*q_proj")
    for name, measured in expected.items():
        assert found[name].tokens == measured.tokens
        torch.testing.assert_close(found[name].input_norm, measured.input_norm, rtol=1e-3, atol=1e-4)


def test_labels_of_minus_100_are_padding_of_a_decoder_that_is_fed_with_them():
    model = lively(tiny("t5"))
    labels = torch.randint(3, 61, (2, 8))
    labels[1, 3:] = -100
    source = torch.randint(3, 61, (2, 9))
    alone = [{"input_ids": source[:1], "labels": labels[:1]}, {"input_ids": source[1:], "labels": labels[1:, :3]}]
    assert_same_statistics(model, alone, [{"input_ids": source, "labels": labels}])


def test_virtual_tokens_of_prompts_count_and_padding_does_not():
    model = get_peft_model(
        tiny("llama"), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    ).eval()
    sequences = texts(8, 3)
    ids, mask = padded(sequences)
    alone = [{"input_ids": s, "attention_mask": torch.ones_like(s)} for s in sequences]
    found = statistics(model, [{"input_ids": ids, "attention_mask": mask}])
    expected = statistics(model, alone)
    for name, measured in expected.items():
        assert found[name].tokens == measured.tokens == 8 + 3 + 2 * 3, name


@pytest.mark.parametrize("left", [False, True])
def test_masks_of_pairs_of_tokens_say_which_are_padding(left):
    sequences = texts(8, 3)
    ids, mask = padded(sequences, left=left)
    pairs = (mask[:, None, None] * torch.ones(8, 8).tril() * mask[:, None, :, None]).bool()
    found = statistics(tiny("llama"), [{"input_ids": ids, "attention_mask": pairs}])
    assert {measured.tokens for measured in found.values()} == {11}


# -- what a batch says outright -------------------------------------------------------------------------------------


def test_token_mask_leaves_out_tokens_that_others_still_attend_to():
    model, ids = tiny("llama"), torch.randint(3, 61, (2, 8))
    template = torch.ones(2, 8, dtype=torch.long)
    template[:, :3] = 0
    found = statistics(model, [{"input_ids": ids, "token_mask": template}])
    assert {measured.tokens for measured in found.values()} == {10}
    seen = []
    hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    expected = seen[0][:, 3:].flatten(0, 1).norm(dim=0)
    torch.testing.assert_close(found["model.layers.1.self_attn.q_proj"].input_norm, expected)


def test_each_side_of_an_encoder_decoder_has_a_token_mask_of_its_own():
    batch = {"input_ids": torch.randint(3, 61, (2, 9)), "decoder_input_ids": torch.randint(3, 61, (2, 6))}
    batch["token_mask"] = (torch.arange(9) < 5).long().expand(2, 9)
    batch["decoder_token_mask"] = (torch.arange(6) < 2).long().expand(2, 6)
    found = statistics(lively(tiny("bart")), [batch])
    tokens = {name: measured.tokens for name, measured in found.items()}
    assert tokens["model.encoder.layers.1.fc1"] == 10
    assert tokens["model.decoder.layers.1.fc1"] == 4
    # The encoder's states, which the decoder attends to, are counted by the encoder's mask.
    assert tokens["model.decoder.layers.1.encoder_attn.k_proj"] == 10
    assert tokens["model.decoder.layers.1.encoder_attn.q_proj"] == 4


# -- models of one's own --------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Of torch's own layers, with torch's convention: True = padding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True) for _ in range(2))

    def forward(self, input_ids, padding_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding_mask)
        return x


def test_masks_of_torchs_convention_are_understood():
    sequences = texts(8, 3)
    ids, mask = padded(sequences)
    batch = {"input_ids": ids, "padding_mask": mask == 0}
    assert_same_statistics(
        Encoder().eval(), [{"input_ids": s} for s in sequences], [batch], exclude_modules=["out_proj"]
    )


class Sorted(nn.Module):
    """Multiplies rows of the first token of all sequences, then of the second, by a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x, attention_mask=None):
        rows = self.norm(x).transpose(0, 1).flatten(0, 1)
        return x + (rows @ self.fc.weight.T).view(x.shape[1], x.shape[0], 8).transpose(0, 1)


def test_rows_of_tokens_first_are_told_from_rows_of_sequences_first():
    model = Pooled(Sorted).eval()
    sequences = texts(8, 3, 5)
    ids, mask = padded(sequences)
    assert_same_statistics(model, [{"input_ids": s} for s in sequences], [{"input_ids": ids, "attention_mask": mask}])


class Captioner(nn.Module):
    """Gets as many patches of an image as tokens of text, and a mask of the text."""

    def __init__(self):
        super().__init__()
        self.text, self.eyes = Pooled(Sorted), Pooled(Sorted)

    def forward(self, input_ids, patches, attention_mask=None):
        for layer in self.eyes.layers:
            patches = layer(patches)
        return self.text(input_ids, attention_mask) + patches


def test_a_mask_of_text_leaves_an_image_of_as_many_patches_alone():
    ids, mask = padded(texts(8, 3))
    batch = {"input_ids": ids, "patches": torch.randn(2, 8, 8), "attention_mask": mask}
    found = statistics(Captioner().eval(), [batch])
    assert {name: measured.tokens for name, measured in found.items()} == {
        "text.layers.0.fc": 11, "text.layers.1.fc": 11, "eyes.layers.0.fc": 16, "eyes.layers.1.fc": 16
    }  # fmt: skip


class Pooling(nn.Module):
    """Halves the tokens before a layer, so that a row is no token."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x, attention_mask=None):
        y = self.fc(self.norm(x)[:, ::2] + self.norm(x)[:, 1::2])
        return x + y.repeat_interleave(2, 1)


class Pooled(nn.Module):
    def __init__(self, block=None):
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.layers = nn.ModuleList((block or Pooling)() for _ in range(2))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask)
        return x


def test_rows_that_mix_tokens_with_padding_are_refused():
    ids, mask = padded(texts(8, 3))
    with pytest.raises(ValueError, match="'layers.0.fc' gets 8 rows of which it is not known which are padding"):
        prune(Pooled().eval(), 0.5, [{"input_ids": ids, "attention_mask": mask}], criterion="wanda")
    prune(Pooled().eval(), 0.5, [{"input_ids": ids}], criterion="wanda")


def test_a_mask_that_fits_no_tokens_is_refused():
    ids, mask = padded(texts(8, 3))
    with pytest.raises(ValueError, match=r"'attention_mask' of shape \(2, 9\) marks padding, but fits the tokens of"):
        prune(Pooled().eval(), 0.5, [{"input_ids": ids, "attention_mask": F.pad(mask, (1, 0))}], criterion="wanda")


def test_masks_that_say_what_is_left_out_are_read_so():
    config = tf.MptConfig(vocab_size=61, d_model=16, n_layers=2, n_heads=2, max_seq_len=16, expansion_ratio=2)
    torch.manual_seed(0)
    model = tf.MptForCausalLM(config).eval()
    ids = torch.randint(0, 61, (2, 8))
    assert {measured.tokens for measured in statistics(model, ids).values()} == {16}
    # The model gets numbers for pairs of tokens, and its blocks get where these are not zero.
    allowed = torch.ones(8, 8).tril().bool().expand(2, 1, 8, 8).clone()
    allowed[0, :, :, :3] = False
    pairs = torch.zeros(2, 1, 8, 8).masked_fill(~allowed, torch.finfo(torch.float32).min)
    found = statistics(model, [{"input_ids": ids, "attention_mask": pairs}])
    assert {measured.tokens for measured in found.values()} == {13}
