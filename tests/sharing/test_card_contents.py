"""What cards tell of reports, what they keep, and what they leave out."""

import dataclasses
import gc
import json
import warnings
import weakref
from unittest import mock

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_sparse import Fit, MaskLoRAConfig, SparseTrainer, perplexity_by_domain, prune, reconstruct, residual_lora
from peft_sparse.model.environment import remembered
from peft_sparse.sharing import push_folder, write_card
from peft_sparse.sharing.card_template import without_unfilled

from conftest import Samples, tiny
from trainers import arguments


def read(folder):
    return (folder / "README.md").read_text()


def test_a_reconstruction_is_told_with_its_errors_and_cost(tmp_path, tokens):
    model = tiny("llama")
    report = reconstruct(model, "2:4", tokens, criterion="wanda", fit=Fit(max_steps=2))
    model.save_pretrained(tmp_path)
    write_card(tmp_path, report=report, model=model)
    text = read(tmp_path)
    assert "6 regions (submodule, mode SS, tuner `full`, loss `mse`)" in text
    assert "- **Pruning:** criterion `wanda`" in text
    assert "reconstructed in" in text
    assert "arXiv:2510.14444" in text
    assert "pruned in" not in text, "the time of the pruning is part of that of the reconstruction"
    (tmp_path / "report.json").write_text(json.dumps(report.to_dict()))
    (tmp_path / "README.md").unlink()
    write_card(tmp_path, report=tmp_path / "report.json", model=model)
    assert read(tmp_path) == text


def test_without_a_model_the_report_tells_the_zeros(tmp_path):
    model = tiny("llama")
    report = prune(model, {r".*\.mlp\..*": 0.75, r".*_proj": 0.25})
    model.save_pretrained(tmp_path)
    write_card(tmp_path, report=report)
    assert "| mlp.up_proj | 3 | 24 × 16 | 0.7500 |" in read(tmp_path)
    assert "| self_attn.v_proj | 3 | 8 × 16 | 0.2500 |" in read(tmp_path)


def test_perplexities_become_a_table_and_results(tmp_path, tokens):
    model = tiny("llama")
    dense = perplexity_by_domain(model, {"Novels": tokens, "code": tokens[:2]})
    report = prune(model, 0.5)
    measured = perplexity_by_domain(model, {"Novels": tokens, "code": tokens[:2]}, dense=dense)
    model.save_pretrained(tmp_path)
    write_card(tmp_path, report=[report, measured], sizes={"packed": 1_234_567})
    card = ModelCard.load(tmp_path / "README.md")
    found = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert found == {name: pytest.approx(value, abs=1e-4) for name, value in measured.perplexity.items()}
    assert f"| dense | {dense.perplexity['Novels']:.2f} |" in card.text
    assert "- Novels: 66 predicted tokens." in card.text
    assert "packed 1.2 MB" in card.text
    # A user's result of something else stays, and one that was measured again does not.
    card.data.eval_results.append(EvalResult("text-generation", "boolq", "BoolQ", "acc", 0.5))
    card.save(tmp_path / "README.md")
    write_card(tmp_path, report=measured)
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert sorted(result.dataset_name for result in results) == ["BoolQ", "Novels", "code"]


def test_a_correction_is_told_with_its_errors(tmp_path, tokens):
    dense, model = tiny("llama"), tiny("llama")
    prune(model, 0.5)
    adapted, report = residual_lora(model, dense, tokens, r=2)
    adapted.save_pretrained(tmp_path)
    text = read(tmp_path)
    assert "ordinary LoRA adapter" in text
    assert "import peft_sparse" not in text
    assert f"{report.error_pruned:.4f} without the adapter and {report.error:.4f} with it" in text
    assert "fills the zeros of the base" in text


def test_fields_and_sections_that_a_user_filled_stay_through_every_writer(tmp_path):
    model = get_peft_model(tiny("llama"), MaskLoRAConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    prune(model, 0.5)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    card.data.license, card.data.language, card.data["base_model"] = "mit", "en", "me/pruned-llama"
    card.data.tags.append("mine")
    card.text += "\n## Training data\n\nNovels.\n"
    card.save(tmp_path / "README.md")
    model.save_pretrained(tmp_path)
    trainer = SparseTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=Samples())
    trainer.create_model_card(dataset="books")
    trainer.save_model()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.language, card.data.base_model) == ("mit", "en", "me/pruned-llama")
    assert card.data.tags.count("mine") == 1
    assert card.text.count("## Training data\n\nNovels.") == 1
    assert card.text.count("## How to load this adapter") == 1
    assert 'from_pretrained("me/pruned-llama")' in card.text


def test_a_template_loses_what_nobody_filled():
    text = ModelCard.from_template(ModelCardData(), developers="Ada", direct_use="Read it.").text
    cleaned = without_unfilled(text, "name")
    assert cleaned == (
        "# name\n\n## Model Details\n\n### Model Description\n\n- **Developed by:** Ada\n\n"
        "## Uses\n\n### Direct Use\n\nRead it.\n"
    )
    assert without_unfilled(cleaned, "name") == cleaned


def test_a_number_sign_in_code_is_no_heading():
    text = "# name\n\n## Use\n\n```py\n# a comment\nx = 1\n```\n"
    assert without_unfilled(text, "name") == text


def test_an_adapter_of_a_local_base_says_how_to_get_it(tmp_path):
    model = tiny("llama")
    model.name_or_path = model.config._name_or_path = "me/dense"
    prune(model, 0.5)
    model.save_pretrained(tmp_path / "base")
    write_card(tmp_path / "base", model=model)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = MaskLoRAConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, dataclasses.replace(config)).save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model is None
    assert "made from [me/dense]" in card.text
    assert "share the pruned base model too" in card.text
    assert str(tmp_path) not in card.content
    for targets, folder in (("all-linear", "masked"), (["q_proj"], "partly")):
        masked = MaskLoRAConfig(target_modules=targets, task_type="CAUSAL_LM", save_mask=True)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        get_peft_model(base, masked).save_pretrained(tmp_path / folder)
    card = ModelCard.load(tmp_path / "masked" / "README.md")
    assert card.data.base_model == "me/dense"
    assert 'from_pretrained("me/dense")  # the base model, dense or pruned' in card.text
    # Other weights are pruned too, and the adapter does not bring their masks.
    card = ModelCard.load(tmp_path / "partly" / "README.md")
    assert card.data.base_model is None
    assert "and none of the pruned weights that it does not adapt. It belongs to the pruned base model" in card.text
    assert "dense or pruned" not in card.text


def test_pushing_an_adapter_can_name_its_base(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    prune(base, 0.5)
    get_peft_model(base, MaskLoRAConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with mock.patch("peft_sparse.sharing.hub_push.HfApi") as api:
        api.return_value.upload_folder.return_value.pr_url = "address"
        with pytest.warns(UserWarning, match="others do not find on the Hub. Push the base model"):
            push_folder(tmp_path / "adapter", "me/adapter")
        with warnings.catch_warnings(action="error"):
            assert push_folder(tmp_path / "adapter", "me/adapter", base_model="me/base", revision="new") == "address"
    api.return_value.create_branch.assert_called_once_with(api.return_value.create_repo.return_value.repo_id,
                                                           branch="new", exist_ok=True)  # fmt: skip
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "me/base"
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model == "me/base"
    assert 'from_pretrained("me/base")  # the pruned base model' in card.text
    assert 'PeftModel.from_pretrained(model, "me/adapter")' in card.text


def test_numbers_that_json_does_not_know_are_told(tmp_path):
    model = tiny("llama")
    report = prune(model, 0.5).to_dict()
    model.save_pretrained(tmp_path)
    write_card(tmp_path, report=report | {"error": "nan"})
    assert "Mean relative output error of the weights nan" in read(tmp_path)


def test_a_folder_of_others_is_read(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    text = write_card(tmp_path).read_text()
    assert "0.0% of the entries of the matrices inside the blocks are zero." in text
    assert "pruned" not in ModelCard(text).data.tags
    model = tiny("llama")
    prune(model, 0.5)
    model.save_pretrained(tmp_path / "shards", max_shard_size="10kB")
    text = write_card(tmp_path / "shards").read_text()
    assert "50.0% of the entries of the matrices inside the blocks are zero." in text
    assert "| mlp.down_proj | 3 | 16 × 24 | 0.5000 |" in text
    assert "## How it was made" not in text


def test_what_is_remembered_of_a_model_goes_with_it():
    model = tiny("llama")
    prune(model, 0.5)
    assert remembered(model)["pruning"]["sparsity"] == 0.5
    gone = []
    weakref.finalize(model, gone.append, True)
    del model
    gc.collect()
    assert gone  # a table that held the model would keep it alive
