"""A vision tower before a language model: each is pruned by inputs that come to it, or left out."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from peft_sparse import prune, reconstruct, sparsity
from peft_sparse.model.blocks import prunable_weights
from peft_sparse.reconstruction import Fit

from checks import inputs_by_hooks, zeros_of


IMAGE = 63
LANGUAGE = r".*language_model.*proj"


@pytest.fixture
def llava():
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture
def batches():
    """Two of text alone, three with an image."""
    tokens = torch.randint(0, 60, (5, 8))
    tokens[2:, :4] = IMAGE
    images = torch.randn(5, 3, 16, 16)
    return [
        {"input_ids": tokens[i : i + 1]} | ({"pixel_values": images[i : i + 1]} if i > 1 else {}) for i in range(5)
    ]


def test_the_vision_tower_is_measured_on_the_images_there_are(llava, batches):
    expected, found = inputs_by_hooks(llava, batches), {}
    names = {(w.shape, w.matrix().sum().item()): name for name, w in prunable_weights(llava).items()}
    # The last block of the tower is run for nothing: Llava takes the outputs of the one before.
    assert len(names) == 3 * 6 + 2 * 7

    def keep(weight, statistics):
        found[names[tuple(weight.shape), weight.sum().item()]] = statistics.input_norm
        return weight.abs()

    prune(llava, 0.0, criterion=keep, calibration=batches)
    assert found.keys() == expected.keys()
    for name, norm in found.items():
        torch.testing.assert_close(norm, expected[name].norm(dim=0), rtol=1e-4, atol=1e-5)


def test_each_block_is_measured_behind_its_pruned_predecessors_alone(llava, batches):
    """And not behind what an earlier run left in a cache, which Llava's forward names nowhere."""
    found = {}

    def keep(weight, statistics):
        found[len(found)] = statistics.input_norm
        return weight.abs() * statistics.input_norm

    names = [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(2)]
    prune(llava, 0.5, criterion=keep, calibration=batches, target_modules=LANGUAGE)
    expected = inputs_by_hooks(llava, batches)
    for index, name in zip((0, 7), names, strict=True):
        torch.testing.assert_close(found[index], expected[name].norm(dim=0), rtol=1e-4, atol=1e-5)


def test_by_text_alone_the_language_model_is_pruned_and_the_tower_not(llava, batches):
    tokens = torch.cat([batch["input_ids"] for batch in batches[:2]])
    before = zeros_of(llava)
    with pytest.raises(
        ValueError, match=r"No calibration batch runs the blocks of 'model.vision_tower.encoder.layers"
    ):
        prune(llava, 0.5, criterion="wanda", calibration=tokens)
    report = prune(llava, 0.5, criterion="wanda", calibration=tokens, target_modules=LANGUAGE)
    assert len(report.weights) == 14
    assert sparsity(llava, LANGUAGE) == 0.5
    assert all(torch.equal(zeros, before[name]) for name, zeros in zeros_of(llava).items() if "vision" in name)


@pytest.mark.parametrize("mode", ["SS", "DD", "SD"])
def test_the_language_model_alone_is_reconstructed(llava, batches, mode):
    tokens = torch.cat([batch["input_ids"] for batch in batches[:2]])
    fit = Fit(learning_rate=1e-3, holdout=0, epochs=3)
    report = reconstruct(llava, 0.5, tokens, criterion="wanda", target_modules=LANGUAGE, mode=mode, fit=fit)
    assert [region.name for region in report.regions][::2] == [
        f"model.language_model.layers.{i} (attention)" for i in range(2)
    ]
    assert sum(r.error for r in report.regions) < sum(r.error_pruned for r in report.regions)
    assert sparsity(llava, LANGUAGE) == 0.5
