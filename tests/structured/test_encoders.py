"""Encoders whose attention keeps its sizes in an inner module, and whose norms follow the output layers."""

import pytest
import torch
import transformers
from transformers import AutoModelForMaskedLM

from peft_sparse import compact, prune_structured
from peft_sparse.structured.units import find_units

from conftest import SIZES


ENCODERS = ["Bert", "Roberta", "Electra", "MegatronBert", "Esm"]


def encoder(family):
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "mask_token_id": 3, "num_attention_heads": 4, "position_embedding_type": "absolute"}
    config = getattr(transformers, f"{family}Config")(**SIZES | special)
    model = AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("family", ENCODERS)
def test_heads_and_neurons_go_and_the_model_reloads(family, tokens, tmp_path):
    model, inputs = encoder(family), {"input_ids": tokens.clamp(min=4)}
    report = prune_structured(model, 0.4, [inputs])
    assert [layer.kind for layer in report.layers] == ["attention", "mlp"] * len(report.layers[::2])
    with torch.no_grad():
        expected = model(**inputs).logits
        size = sum(parameter.numel() for parameter in model.parameters())
        compact(model)
        assert size - sum(parameter.numel() for parameter in model.parameters()) == report.parameters_removed
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-5)
        model.save_pretrained(tmp_path)
        back = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
        assert type(back) is type(model)
        assert torch.equal(back(**inputs).logits, model(**inputs).logits)
    assert [units.count for units in find_units(back)] == [layer.kept for layer in report.layers]
