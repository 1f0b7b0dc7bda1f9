"""Tiny real models built from configs; nothing is downloaded, and every test starts from one seed."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers


VOCABULARY = 61

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=2),
    "opt": transformers.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=64),
    "gpt2": transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=4, n_positions=64),
    "qwen3": transformers.Qwen3Config(**SIZES, intermediate_size=24, num_key_value_heads=2, head_dim=4),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES, intermediate_size=24, num_key_value_heads=2, head_dim=4, sliding_window=8
    ),
}


def tiny(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[family]).eval()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def llama():
    return tiny("llama")


@pytest.fixture(params=CONFIGS)
def model(request):
    """One tiny model per family."""
    return tiny(request.param)


@pytest.fixture
def tokens():
    return torch.randint(0, VOCABULARY, (6, 12))
