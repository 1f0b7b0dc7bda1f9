"""Push to a server that speaks the Hub's API, and load from it in a fresh process, by the real client."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from conftest import tiny
from hub_server import hub_server


PRELUDE = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent.parent)!r}]
import warnings
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, pipeline
"""

PUSH = """
from conftest import Samples
from peft import get_peft_model
from peft_sparse import MaskLoRAConfig, SparseTrainer, compress, pack_checkpoint, perplexity, prune
from peft_sparse.commands import push
from peft_sparse.sharing import push_folder
from texts import character_tokenizer
from trainers import arguments
import argparse, copy

tokens = torch.randint(0, 61, (8, 12), generator=torch.Generator().manual_seed(1))

def pruned():
    model = AutoModelForCausalLM.from_pretrained("user/dense")
    prune(model, "2:4", tokens, criterion="wanda")
    return model

def adapted(model, **options):
    torch.manual_seed(0)
    config = MaskLoRAConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_weights=False, **options)
    return get_peft_model(model, config)

def outputs(model):
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits

found = {}
# By method of the model: the pruned base, then adapters with and without masks.
model = pruned()
model.push_to_hub("user/pruned")
character_tokenizer().push_to_hub("user/pruned")
adapter = adapted(AutoModelForCausalLM.from_pretrained("user/pruned"))
adapter.push_to_hub("user/adapter")
found["adapter"] = outputs(adapter)
masked = adapted(pruned(), save_mask=True)
masked.push_to_hub("user/masked")
found["masked"] = outputs(masked)
merged = masked.merge_and_unload()
merged.push_to_hub("user/merged")
found["merged"] = outputs(merged)

# A model that this package has not changed.
AutoModelForCausalLM.from_pretrained("user/dense").push_to_hub("user/copy")

# By Trainer: the adapter, and the merged model as a folder.
args = arguments("trained", max_steps=2, push_to_hub=True, hub_model_id="user/trained", hub_strategy="every_save")
args.save_strategy = "steps"
args.save_steps = 1
base = AutoModelForCausalLM.from_pretrained("user/dense")
args.pattern, args.criterion, args.calibration_samples = "2:4", "wanda", 4
trainer = SparseTrainer(base, args, train_dataset=Samples(), peft_config=MaskLoRAConfig(
    r=2, target_modules="all-linear", task_type="CAUSAL_LM", save_mask=True))
trainer.train()
trainer.push_to_hub()
found["trained"] = outputs(trainer.model)
trainer.save_merged_model("whole")
push_folder("whole", "user/whole")

# A folder that was loaded and is pushed by method keeps what its card knows.
report = compress(AutoModelForCausalLM.from_pretrained("user/dense"), "fast", tokens, sparsity=0.5,
                  evaluation={"random tokens": tokens[:4]}, output_dir="compressed", calibration_samples=4,
                  use_cpu=True, report_to="none")
again = AutoModelForCausalLM.from_pretrained("compressed/sparse")
again.push_to_hub("user/again")
found["again"] = outputs(again)

# Packed, as a folder.
pack_checkpoint("compressed/sparse", "packed")
push_folder("packed", "user/packed")

# By command.
parser = argparse.ArgumentParser()
push.add_arguments(parser)
print(push.run(parser.parse_args(["compressed/sparse", "user/compressed", "--report", "compressed/report.json"])))
torch.save(found, "outputs.pt")
"""

LOAD = """
from peft import AutoPeftModelForCausalLM, PeftModel
tokens = torch.randint(0, 61, (8, 12), generator=torch.Generator().manual_seed(1))
expected = torch.load("outputs.pt")

def check(name, model):
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens).logits
    assert torch.allclose(logits, expected[name], atol=1e-5), (name, (logits - expected[name]).abs().max())

for name in ("merged", "again"):
    check(name, AutoModelForCausalLM.from_pretrained(f"user/{name}"))
assert "peft_sparse" not in sys.modules

import peft_sparse
check("adapter", PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("user/pruned"), "user/adapter"))
check("adapter", AutoPeftModelForCausalLM.from_pretrained("user/adapter"))
check("adapter", AutoModelForCausalLM.from_pretrained("user/adapter"))
expected["packed"] = expected["again"]
check("packed", AutoModelForCausalLM.from_pretrained("user/packed"))
check("masked", PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("user/dense"), "user/masked"))
check("masked", AutoPeftModelForCausalLM.from_pretrained("user/masked"))
check("trained", AutoPeftModelForCausalLM.from_pretrained("user/trained"))
for name in ("whole", "compressed"):
    assert peft_sparse.sparsity(AutoModelForCausalLM.from_pretrained(f"user/{name}")) == 0.5
write = pipeline("text-generation", model="user/pruned", device="cpu")
assert write("A", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("A")
"""


def run(hub, folder, home, code):
    script = folder / "script.py"
    script.write_text(PRELUDE + textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env=hub.environment(home),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server after everything was pushed by one process and loaded by another, which has its own cache."""
    folder = tmp_path_factory.mktemp("work")
    with hub_server() as server:
        tiny("llama").save_pretrained(folder / "dense")
        names = ("config.json", "generation_config.json", "model.safetensors")
        server.revisions["user/dense"] = {}
        files = {name: (folder / "dense" / name).read_bytes() for name in names}
        server.add_commit("user/dense", "main", files)
        server.printed = run(server, folder, tmp_path_factory.mktemp("pushing"), PUSH)
        run(server, folder, tmp_path_factory.mktemp("loading"), LOAD)
        yield server


def card_of(hub, name):
    text = hub.files(f"user/{name}")["README.md"].decode()
    assert "ore information needed" not in text.lower()
    assert "Model ID" not in text
    assert "/tmp" not in text
    assert {"peft_sparse", "sparse", "pruned"} <= set(ModelCard(text).data.tags)
    return ModelCard(text)


@pytest.mark.slow
def test_what_is_pushed_loads_in_a_fresh_process(hub):
    # The fixture has loaded it.
    assert "model.safetensors" in hub.sent_large
    assert "adapter_model.safetensors" in hub.sent_large
    assert "/user/compressed/commit/" in hub.printed


@pytest.mark.parametrize("name", ["adapter", "masked", "trained"])
def test_adapters_have_cards(hub, name):
    card = card_of(hub, name)
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model == {"adapter": "user/pruned"}.get(name, "user/dense")
    assert f'PeftModel.from_pretrained(model, "user/{name}")' in card.text
    assert "| self_attn.q_proj | 3 | 16 × 16 | 0.5000 |" in card.text
    assert "peft-sparse evaluate" in card.text
    if name != "adapter":
        assert "Pattern: 2:4 (2 of every 4 inputs are kept)" in card.text
        assert "criterion `wanda`" in card.text
        assert 'from_pretrained("user/dense")  # the base model, dense or pruned' in card.text
    if name == "trained":
        assert "2 steps of 4 sequences, learning rate 0.01" in card.text


@pytest.mark.parametrize("name", ["pruned", "merged", "whole"])
def test_plain_models_have_cards(hub, name):
    card = card_of(hub, name)
    assert card.data.library_name == "transformers"
    assert card.data.base_model == "user/dense"
    assert f'AutoModelForCausalLM.from_pretrained("user/{name}")' in card.text
    assert "50.0% of the prunable weights of this model are zero" in card.text
    assert "import peft_sparse" not in card.text
    assert "Size of the weights: on disk" in card.text


@pytest.mark.parametrize("name", ["compressed", "again"])
def test_a_compression_tells_its_recipe_perplexity_and_results(hub, name):
    card = card_of(hub, name)
    assert card.data.base_model == "user/dense"
    assert f'from_pretrained("user/{name}")' in card.text
    assert "- **Recipe:** `fast`" in card.text
    assert "- **Calibration:** 4 sequences of 12 tokens" in card.text
    assert "| model | perplexity, random tokens | sparsity |" in card.text
    assert "random tokens: 4 sequences of 12 tokens" in card.text
    assert card.data.model_name == name
    assert f"# {name}\n" in card.text
    (result,) = card.data.eval_results
    assert (result.metric_type, result.dataset_name) == ("perplexity", "random tokens")
    assert f"| saved | {result.metric_value:.2f} |" in card.text


def test_a_packed_model_has_a_card_of_its_own(hub):
    card = card_of(hub, "packed")
    assert card.data.base_model == "user/dense"
    assert "import peft_sparse  # registers the packed format with Transformers" in card.text
    assert "- **Recipe:** `fast`" in card.text  # of the report beside the folder that was packed
    assert "Size of the weights: on disk" in card.text
    assert ", plain " in card.text


def test_the_card_of_a_model_that_was_not_changed_is_left_alone(hub):
    text = hub.files("user/copy")["README.md"].decode()
    assert "peft_sparse" not in text
    assert "[More Information Needed]" in text


def test_no_file_on_the_hub_names_a_folder_of_the_machine(hub):
    for repo in hub.revisions:
        for name, content in hub.files(repo).items():
            if name.endswith(".json"):
                assert "/tmp" not in json.dumps(json.loads(content)), (repo, name)
