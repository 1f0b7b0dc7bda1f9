"""Tiny real models built from configs; nothing is downloaded, and every test starts from one seed."""

import copy
import gc
import os
import sys


os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run side by side, one thread each.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import transformers


if not torch.accelerator.is_available():
    # Each call of `torch.manual_seed` writes down its stack for devices that may come, which takes a millisecond.
    torch.cuda.manual_seed_all = torch.xpu.manual_seed_all = torch.mtia.manual_seed_all = lambda seed: None

VOCABULARY = 61

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED = {"intermediate_size": 24, "num_key_value_heads": 2}
# What tuners and training are tested on.
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, **GATED),
    "opt": transformers.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=64),
    "gpt2": transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=4, n_positions=64),
    "qwen3": transformers.Qwen3Config(**SIZES, **GATED, head_dim=4),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES,
        **GATED,
        head_dim=4,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}
# Every way in which blocks are called, layers are stored and inputs are shaped: what pruning is tested on.
SHORT = SIZES | {"num_hidden_layers": 2}
FAMILIES = CONFIGS | {
    "mistral": transformers.MistralConfig(**SHORT, **GATED, sliding_window=8),
    "qwen2": transformers.Qwen2Config(**SHORT, **GATED),
    "gemma2": transformers.Gemma2Config(**SHORT, **GATED, head_dim=4, sliding_window=8),
    "gpt_neox": transformers.GPTNeoXConfig(**SHORT, intermediate_size=24),
    "phi": transformers.PhiConfig(**SHORT, **GATED),
    "mixtral": transformers.MixtralConfig(**SHORT, **GATED, num_local_experts=4),
    "qwen2_moe": transformers.Qwen2MoeConfig(
        **SHORT,
        **GATED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=12,
    ),
    "gpt_oss": transformers.GptOssConfig(
        **SHORT, **GATED, head_dim=4, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
    "t5": transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
    "bart": transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=64,
    ),
    "vit": transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=8, patch_size=4
    ),
}
EXPERTS = ("mixtral", "qwen2_moe", "gpt_oss")
ENCODER_DECODERS = ("t5", "bart")


def tiny(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    kind = "Seq2SeqLM" if family in ENCODER_DECODERS else "ImageClassification" if family == "vit" else "CausalLM"
    # Saving a model writes its dtype and class into the configuration.
    config = copy.deepcopy(FAMILIES[family])
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config).eval()
    if family in EXPERTS:
        # Biases start at zero and routers nearly so: with values, a mistake shows.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def inputs_of(family: str, sequences: int = 6) -> dict[str, torch.Tensor]:
    """A batch of model inputs, of two lengths where there are two sides."""
    tokens = torch.randint(0, VOCABULARY, (sequences, 12))
    if family == "vit":
        return {"pixel_values": torch.randn(sequences, 3, 8, 8)}
    if family in ENCODER_DECODERS:
        return {"input_ids": tokens, "decoder_input_ids": torch.randint(0, VOCABULARY, (sequences, 7))}
    return {"input_ids": tokens}


class Samples(torch.utils.data.Dataset):
    """A training set, the same every time."""

    def __init__(self, count=24):
        self.tokens = torch.randint(0, VOCABULARY, (count, 10), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def pytest_collection_finish():
    _freeze()


def _freeze():
    """Take what is there out of garbage collection.

    Trainer collects garbage in every run. That takes half a second if it looks at every object of what is imported.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _imports_are_no_garbage():
    imported = len(sys.modules)
    yield
    if len(sys.modules) > imported:
        _freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def llama():
    return tiny("llama")


@pytest.fixture(params=CONFIGS)
def model(request):
    """One tiny model per family of decoders."""
    return tiny(request.param)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def tokens():
    return torch.randint(0, VOCABULARY, (6, 12))
