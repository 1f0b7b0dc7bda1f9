"""compact: the same outputs from fewer parameters, and back from disk with Transformers alone wherever it can."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from peft_sparse import SparseTrainer, SparseTrainingArguments, compact, prune, prune_structured, sparsity
from peft_sparse.structured.saving import MODEL_TYPE
from peft_sparse.structured.units import find_units

from conftest import GATED, SIZES, tiny
from test_flap import SUPPORTED, grouped, with_biases


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model, tokens):
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    return counter.get_total_flops()


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("family", SUPPORTED)
def test_outputs_stay_and_the_model_shrinks_and_reloads(family, tokens, tmp_path):
    model = with_biases(family)
    dense_flops = flops(model, tokens)
    report = prune_structured(model, 0.4, calibration=tokens)
    expected, masked_parameters = logits(model, tokens), parameters(model)
    assert compact(model) is model
    assert torch.allclose(logits(model, tokens), expected, atol=1e-6)
    # Zero biases that were added to q, k, v, gate and up are cut out with their units.
    assert masked_parameters - parameters(model) >= report.parameters_removed
    assert flops(model, tokens) < 0.85 * dense_flops
    assert type(model).__name__.startswith("Compact")
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(back) is type(model)
    assert torch.equal(logits(back, tokens), logits(model, tokens))
    prompt = tokens[:2, :4]
    cached = back.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False))


# The table of docs/details/structured.md: what loads layers of equal width.
PLAIN, BIASES, OWN = "Transformers alone", "`import peft_sparse` for biases", "`import peft_sparse`"
DOCUMENTED = {
    "llama": PLAIN,
    "phi": PLAIN,
    "mistral": BIASES,
    "qwen2": BIASES,
    "qwen3": BIASES,
    "gemma2": BIASES,
    "gemma3": BIASES,
    "opt": OWN,
    "Granite": PLAIN,
    "SmolLM3": PLAIN,
    "Starcoder2": PLAIN,
    "Nemotron": PLAIN,
    "Gemma": BIASES,
    "Cohere": BIASES,
    "Olmo": BIASES,
    "Ernie4_5": BIASES,
    "SeedOss": BIASES,
    "StableLm": OWN,
}


def of_family(family):
    if family in SUPPORTED:
        return with_biases(family)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{family}Config")(**SIZES, **GATED, **special)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("family", DOCUMENTED)
def test_the_documented_families_load_as_documented(family, compensate, tokens, tmp_path):
    model = of_family(family)
    prune_structured(model, 0.4, structure="ul-um", calibration=tokens, compensate=compensate)
    expected = logits(model, tokens)
    compact(model)
    assert torch.allclose(logits(model, tokens), expected, atol=1e-6)
    needs_import = DOCUMENTED[family] == OWN or (DOCUMENTED[family] == BIASES and compensate)
    assert type(model).__name__.startswith("Compact") == needs_import
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(back) is type(model)
    assert torch.equal(logits(back, tokens), logits(model, tokens))


def load_elsewhere(folder, names, tokens):
    """Logits of each saved model, or the error, in one process that imports Transformers alone."""
    torch.save(tokens, folder / "tokens.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "folder, results = sys.argv[1], {}\n"
        "tokens = torch.load(f'{folder}/tokens.pt')\n"
        "for name in sys.argv[2:]:\n"
        "    try: model = AutoModelForCausalLM.from_pretrained(f'{folder}/{name}').eval()\n"
        "    except ValueError as error: results[name] = str(error); continue\n"
        "    results[name] = model(tokens).logits.detach()\n"
        "torch.save(results, f'{folder}/results.pt')\n"
        "assert 'peft_sparse' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code, str(folder), *names], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return torch.load(folder / "results.pt")


@pytest.mark.slow
def test_transformers_alone_loads_what_a_configuration_can_describe(tokens, tmp_path):
    equal, opt, unequal = tiny("llama"), with_biases("opt"), tiny("llama")
    prune_structured(equal, 0.4, structure="ul-um", calibration=tokens)
    equal.save_pretrained(tmp_path / "masked")
    expected = {"masked": logits(equal, tokens), "compact": logits(equal, tokens)}
    compact(equal).save_pretrained(tmp_path / "compact")
    saved = json.loads((tmp_path / "compact" / "config.json").read_text())
    assert (saved["model_type"], saved["num_attention_heads"], saved["num_key_value_heads"]) == ("llama", 2, 1)
    assert (saved["head_dim"], saved["attention_bias"], saved["mlp_bias"]) == (4, True, True)

    prune_structured(opt, 0.4, structure="ul-um", target_modules=["mlp"], calibration=tokens)
    compact(opt).save_pretrained(tmp_path / "opt")
    assert opt.config.ffn_dim == 14
    expected["opt"] = logits(opt, tokens)

    prune_structured(unequal, 0.4, calibration=tokens)
    compact(unequal).save_pretrained(tmp_path / "unequal")
    saved = json.loads((tmp_path / "unequal" / "config.json").read_text())
    assert saved["model_type"] == MODEL_TYPE == "peft_sparse_compact"
    widths = [(units.count, units.count * units.heads_per_unit) for units in find_units(unequal)]
    assert [entry["neurons"] for entry in saved["layer_widths"]] == [count for count, _ in widths[1::2]]
    assert [entry["heads"] for entry in saved["layer_widths"]] == [heads for _, heads in widths[::2]]

    results = load_elsewhere(tmp_path, [*expected, "unequal"], tokens)
    for name, values in expected.items():
        assert torch.allclose(results[name], values, atol=1e-6), name
    assert MODEL_TYPE in results["unequal"]


def test_masks_with_new_biases_survive_saving_in_every_family(tokens, tmp_path):
    for family in SUPPORTED:
        model = tiny(family)
        prune_structured(model, 0.3, calibration=tokens)
        model.save_pretrained(tmp_path / family)
        back = AutoModelForCausalLM.from_pretrained(tmp_path / family).eval()
        assert torch.equal(logits(back, tokens), logits(model, tokens)), family
        assert sparsity(back) == sparsity(model)


def test_a_compact_model_is_pruned_and_compacted_again(tokens, tmp_path):
    model = tiny("qwen3")
    for ratio in (0.2, 0.3):
        prune_structured(model, ratio, calibration=tokens)
        masked = logits(model, tokens)
        compact(model)
        assert torch.allclose(logits(model, tokens), masked, atol=1e-6)
        assert type(model).__name__ == "CompactQwen3ForCausalLM"
        model.save_pretrained(tmp_path, max_shard_size="5KB")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), logits(model, tokens))


def test_other_heads_of_the_model_load_too(tokens, tmp_path):
    model = tiny("llama")
    prune_structured(model, 0.4, calibration=tokens)
    compact(model).save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 16
    assert type(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))) is type(model)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@torch.no_grad()
def test_single_query_heads_go_where_every_key_head_loses_as_many(kv_heads, tokens):
    model = grouped(kv_heads)
    group = 6 // kv_heads
    first = find_units(model)[0]
    dead = torch.zeros(kv_heads, group, dtype=torch.bool)
    dead[:, 0] = group > 1
    dead[0] |= kv_heads > 1
    first.output.weight[:, dead.flatten().repeat_interleave(4)] = 0
    before = logits(model, tokens)
    compact(model)
    assert torch.allclose(logits(model, tokens), before, atol=1e-6)
    kept = find_units(model)[0]
    assert kept.count == max(kv_heads - 1, 1)
    assert kept.heads_per_unit == max(group - 1, 1)


@torch.no_grad()
def test_heads_that_cannot_go_alone_stay(tokens):
    model = grouped(2)
    find_units(model)[0].output.weight[:, :4] = 0
    before, size = logits(model, tokens), parameters(model)
    compact(model)
    assert torch.equal(logits(model, tokens), before)
    assert parameters(model) == size


@torch.no_grad()
def test_a_layer_without_any_head_or_neuron_keeps_one(tokens):
    model = tiny("llama")
    for units in find_units(model)[:2]:
        units.output.weight.zero_()
    before = logits(model, tokens)
    compact(model)
    assert torch.allclose(logits(model, tokens), before, atol=1e-6)
    assert [(units.count, units.heads_per_unit) for units in find_units(model)[:2]] == [(1, 1), (1, 1)]


def test_heads_that_do_not_divide_the_hidden_size_are_beyond_llamas_configuration(tokens, tmp_path):
    # LlamaConfig refuses 5 heads of hidden size 24, whatever `head_dim`.
    model = grouped(6)
    prune_structured(model, 0.1, structure="ul-um", target_modules=["self_attn"], calibration=tokens, compensate=False)
    compact(model).save_pretrained(tmp_path)
    assert type(model) is not LlamaForCausalLM
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), logits(model, tokens))


def test_compact_changes_nothing_without_dead_units(tokens):
    model = tiny("llama")
    prune(model, 0.3)
    before, config = copy.deepcopy(model), model.config.to_dict()
    compact(model)
    assert type(model) is LlamaForCausalLM
    assert model.config.to_dict() == config
    assert torch.equal(logits(model, tokens), logits(before, tokens))


def test_another_model_of_the_same_configuration_is_left_alone(tokens):
    config = tiny("llama").config
    one, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    for structure in ("ul-um", "al-am"):
        prune_structured(one, 0.3, structure=structure, calibration=tokens)
        compact(one)
    assert other.config is config
    assert type(config).__name__ == "LlamaConfig"
    assert (config.attention_bias, config.num_attention_heads) == (False, 4)
    assert all(module.config is one.config for module in one.modules() if hasattr(module, "config"))


def test_compact_models_are_pickled(tokens):
    model = tiny("qwen3")
    prune_structured(model, 0.4, calibration=tokens)
    back = pickle.loads(pickle.dumps(compact(model)))
    assert type(back) is type(model)
    assert torch.equal(logits(back, tokens), logits(model, tokens))


def test_gradients_and_frozen_parameters_survive(tokens):
    model = tiny("llama").requires_grad_(False)
    prune_structured(model, 0.4, calibration=tokens)
    compact(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_trainer_trains_and_saves_a_compact_model(tokens, tmp_path):
    model = tiny("qwen3")
    prune_structured(model, 0.4, calibration=tokens)
    compact(model)
    arguments = SparseTrainingArguments(tmp_path, max_steps=2, use_cpu=True, report_to="none", learning_rate=1e-2)
    samples = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = SparseTrainer(model, arguments, train_dataset=samples)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert torch.equal(logits(back.eval(), tokens), logits(model.eval(), tokens))


def test_a_static_cache_generates_the_same(tokens):
    model = tiny("llama")
    prune_structured(model, 0.4, calibration=tokens)
    compact(model)
    options = {"max_new_tokens": 5, "do_sample": False}
    dynamic = model.generate(tokens[:1], **options)
    assert torch.equal(
        model.generate(tokens[:1], cache_implementation="static", disable_compile=True, **options), dynamic
    )


def test_layers_that_share_a_weight_are_left_as_they_are(tokens):
    model = tiny("llama")
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.up_proj.weight = first.up_proj.weight
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, :5] = 0
    before = logits(model, tokens)
    compact(model)
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == [24, 24, 19]
    assert second.up_proj.weight is first.up_proj.weight
    assert torch.allclose(logits(model, tokens), before, atol=1e-6)
