"""Model cards on every way by which an adapter leaves. There is no Hub: what would be uploaded is looked at."""

import contextlib
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import datasets
import pytest
import transformers.modeling_utils
import transformers.trainer
import transformers.utils.hub
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, SparseTrainer, SparseTrainingArguments, prune
from peft_sparse.model.tree import is_hub_name
from peft_sparse.sharing import enable_cards, write_card
from peft_sparse.sharing.card import complete_card
from peft_sparse.sharing.card_facts import Facts

from conftest import Samples, tiny
from trainers import arguments


TAGS = {"peft_sparse", "sparse", "pruned"}


def config(**kwargs):
    return MaskLoRAConfig(**{"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | kwargs)


def pruned():
    model = tiny("llama")
    prune(model, 0.5)
    return model


def by_peft(**kwargs):
    return get_peft_model(pruned(), config(**kwargs))


def by_transformers(**kwargs):
    model = pruned()
    model.add_adapter(config(**kwargs))
    return model


ATTACHING = pytest.mark.parametrize("attach", [by_peft, by_transformers])


class Hub:
    """Stands for the Hub, and keeps the model cards of what is uploaded."""

    def __init__(self):
        self.cards = []

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, operations, **kwargs):
        files = {operation.path_in_repo: operation.path_or_fileobj for operation in operations}
        assert "adapter_config.json" in files or any(name.endswith("/adapter_config.json") for name in files)
        self.cards.append(Path(files["README.md"]).read_text())

    def upload_folder(self, folder_path, path_in_repo=None, **kwargs):
        self.cards.append((Path(folder_path) / "README.md").read_text())
        return SimpleNamespace(done=lambda: True)


@contextlib.contextmanager
def no_hub():
    hub = Hub()
    with (
        mock.patch.object(transformers.utils.hub, "hf_api", return_value=hub),
        mock.patch.object(transformers.modeling_utils, "hf_api", return_value=hub),
        mock.patch.object(transformers.trainer, "hf_api", return_value=hub),
        mock.patch("transformers.trainer.PushInProgress"),
    ):
        yield hub


def assert_tells(text, heading="## How to load this adapter"):
    card = ModelCard(text)
    assert text.count(heading) == 1
    assert text.count("import peft_sparse") == 1
    assert "50.0% of the entries of the adapted weights are zero" in text
    assert "ore information needed" not in text.lower()
    assert set(card.data.tags) >= TAGS
    assert len(set(card.data.tags)) == len(card.data.tags)


def read(folder):
    return (Path(folder) / "README.md").read_text()


@ATTACHING
def test_a_saved_adapter_tells_how_to_load_it_and_saving_twice_changes_nothing(attach, tmp_path):
    model = attach()
    model.save_pretrained(tmp_path)
    first = read(tmp_path)
    assert_tells(first)
    model.save_pretrained(tmp_path)
    assert read(tmp_path) == first


def test_the_cards_of_named_adapters_tell_it_too(tmp_path):
    model = get_peft_model(pruned(), config(), adapter_name="mine")
    model.save_pretrained(tmp_path)
    assert_tells(read(tmp_path))
    assert_tells(read(tmp_path / "mine"))


@ATTACHING
@pytest.mark.parametrize("name", ["default", "mine"])
def test_pushing_a_model_tells_it(attach, name, tmp_path):
    model = pruned()
    if attach is by_peft:
        model = get_peft_model(model, config(), adapter_name=name)
    else:
        model.add_adapter(config(), name)
    with no_hub() as hub:
        model.push_to_hub("me/adapter")
        if attach is by_transformers:
            model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/adapter")
    for card in hub.cards:
        assert_tells(card)
    assert len(hub.cards) == (1 if attach is by_peft else 2)


def trained_by(kind, model, folder, **kwargs):
    kinds = {Trainer: TrainingArguments, SparseTrainer: SparseTrainingArguments}
    options = {"max_steps": 2, "save_steps": 1, "hub_model_id": "me/adapter", "save_strategy": "no"} | kwargs
    return kind(model, arguments(folder, kind=kinds[kind], **options), train_dataset=Samples())


@ATTACHING
@pytest.mark.parametrize("kind", [Trainer, SparseTrainer])
@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "end"])
def test_a_trainer_pushes_cards_that_tell_it(attach, kind, strategy, tmp_path):
    with no_hub() as hub:
        trainer = trained_by(kind, attach(), tmp_path, push_to_hub=True, hub_strategy=strategy, save_strategy="steps")
        trainer.train()
        trainer.push_to_hub()
    assert len(hub.cards) == {"every_save": 3, "end": 1}.get(strategy, 5)
    for card in hub.cards:
        assert_tells(card)


@ATTACHING
@pytest.mark.parametrize("kind", [Trainer, SparseTrainer])
def test_a_trainer_writes_cards_that_tell_it(attach, kind, tmp_path):
    trainer = trained_by(kind, attach(), tmp_path)
    trainer.create_model_card()
    assert_tells(read(tmp_path))
    trainer.save_model()
    assert_tells(read(tmp_path))
    trainer.create_model_card(tags="mine")
    assert_tells(read(tmp_path))
    assert "mine" in ModelCard.load(tmp_path / "README.md").data.tags or attach is by_peft


def test_the_trainers_of_trl_write_cards_that_tell_it(tmp_path):
    trl = pytest.importorskip("trl")
    words = {f"w{index}": index for index in range(59)} | {"<pad>": 59, "<eos>": 60}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    data = datasets.Dataset.from_list([{"input_ids": sample["input_ids"].tolist()} for sample in Samples(8)])
    options = {"push_to_hub": True, "hub_model_id": "me/adapter", "hub_strategy": "every_save"}
    options |= {"bf16": False, "gradient_checkpointing": None}
    args = arguments(tmp_path, kind=trl.SFTConfig, save_strategy="steps", save_steps=1, max_steps=2, **options)
    with no_hub() as hub:
        trainer = trl.SFTTrainer(pruned(), args, train_dataset=data, processing_class=tokenizer, peft_config=config())
        trainer.create_model_card(model_name="adapter")
        assert_tells(read(tmp_path))
        trainer.train()
        trainer.push_to_hub()
    assert len(hub.cards) == 3
    for card in hub.cards:
        assert_tells(card)
        assert "sft" in ModelCard(card).data.tags


def test_a_trainer_that_is_defined_later_writes_cards_that_tell_it(tmp_path):
    class Own(Trainer):
        def create_model_card(self, title):
            (tmp_path / "README.md").write_text(f"# {title}\n")

    Own(by_peft(), arguments(tmp_path, TrainingArguments), train_dataset=Samples()).create_model_card("Mine")
    assert read(tmp_path).startswith("---\n")
    assert "# Mine" in read(tmp_path)
    assert_tells(read(tmp_path))


def test_the_card_follows_the_sparsity_of_the_base(tmp_path):
    model = by_peft()
    model.save_pretrained(tmp_path)
    prune(model, 0.75)
    model.save_pretrained(tmp_path)
    assert "75.0% of the entries" in read(tmp_path)
    assert "50.0%" not in read(tmp_path)


def test_the_base_model_is_named_and_a_folder_of_this_machine_is_not(tmp_path):
    model = pruned()
    model.save_pretrained(tmp_path / "base")
    local = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for attach in ("peft", "transformers"):
        if attach == "peft":
            adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config())
        else:
            adapted = local
            adapted.add_adapter(config())
        folder = tmp_path / attach
        adapted.save_pretrained(folder)
        trainer = trained_by(Trainer, adapted, folder)
        for card in (read(folder), (trainer.create_model_card(), read(folder))[1]):
            assert str(tmp_path) not in card
            assert "share the pruned base model too" in card
            assert ModelCard(card).data.base_model is None
        saved = json.loads((folder / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == str(tmp_path / "base")
    named = tiny("llama")
    named.name_or_path = named.config._name_or_path = "someone/llama"
    with warnings.catch_warnings(action="ignore"):  # PEFT asks the Hub for the vocabulary
        get_peft_model(named, config()).save_pretrained(tmp_path / "named")
    assert 'from_pretrained("someone/llama")  # the pruned base model' in read(tmp_path / "named")
    assert ModelCard.load(tmp_path / "named" / "README.md").data.base_model == "someone/llama"


def test_a_folder_that_is_gone_is_not_told_either(tmp_path):
    link = "[/home/me/llama](https://huggingface.co//home/me/llama)"
    (tmp_path / "README.md").write_text(f"---\nbase_model: /home/me/llama\n---\nA version of {link}.\n")
    complete_card(tmp_path, Facts("adapter", base="/home/me/llama"))
    assert "home" not in read(tmp_path)
    assert "A version of the pruned base model." in read(tmp_path)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("gpt2", True),
        ("me/llama-3.1_8b", True),
        ("/home/me/llama", False),
        ("./llama", False),
        ("../llama", False),
        ("a/b/c", False),
        ("C:\\llama", False),
        ("", False),
        (None, False),
    ],
)
def test_names_of_the_hub_are_told_from_folders(name, known):
    assert is_hub_name(name) is known


def test_a_folder_with_a_name_of_the_hub_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "me" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name("me/llama")


def test_the_task_chooses_the_class_that_loads_the_base(tmp_path):
    get_peft_model(pruned(), config(task_type=None)).save_pretrained(tmp_path / "none")
    assert "AutoModelForCausalLM.from_pretrained" in read(tmp_path / "none")
    masked = config(task_type="SEQ_CLS", save_mask=True, target_modules="all-linear")
    get_peft_model(pruned(), masked).save_pretrained(tmp_path / "classes")
    assert "AutoModelForSequenceClassification.from_pretrained" in read(tmp_path / "classes")
    assert "It can be loaded onto the dense base model" in read(tmp_path / "classes")


def test_what_is_written_around_the_part_stays(tmp_path):
    model = pruned()
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\ntags:\n- mine\n---\n# Mine\n\nWords.\n\n## Notes\n\nMore.\n"
    )
    write_card(tmp_path, model=model)
    prune(model, 0.75)
    write_card(tmp_path, model=model)
    text = read(tmp_path)
    assert (
        text.index("# Mine")
        < text.index("Words.")
        < text.index("75.0%")
        < text.index("## Notes")
        < text.index("More.")
    )
    assert "50.0%" not in text
    card = ModelCard(text)
    assert card.data.tags == ["mine", "peft_sparse", "sparse", "pruned"]
    assert card.data.license == "mit"
    write_card(tmp_path, model=model)
    assert read(tmp_path) == text


def test_an_adapter_of_a_dense_model_is_not_called_pruned(tmp_path):
    get_peft_model(tiny("llama"), ScaledLoRAConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert not {"sparse", "pruned"} & set(ModelCard.load(tmp_path / "README.md").data.tags)


def test_cards_of_others_stay_as_they_are(tmp_path):
    get_peft_model(pruned(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "peft_sparse" not in read(tmp_path)
    (tmp_path / "trained").mkdir()
    trained_by(Trainer, tiny("llama"), tmp_path / "trained").create_model_card()
    assert "peft_sparse" not in read(tmp_path / "trained")


def test_a_plain_model_that_was_trained_tells_its_sparsity(tmp_path):
    trained_by(SparseTrainer, pruned(), tmp_path).create_model_card()
    assert "50.0% of the prunable weights" in read(tmp_path)
    assert set(ModelCard.load(tmp_path / "README.md").data.tags) >= TAGS


def test_extending_twice_changes_nothing():
    before = [vars(kind)["create_model_card"] for kind in (Trainer, SparseTrainer)]
    enable_cards()
    assert [vars(kind)["create_model_card"] for kind in (Trainer, SparseTrainer)] == before
