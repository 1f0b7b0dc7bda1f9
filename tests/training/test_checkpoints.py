"""Checkpoints: which are complete, what they hold of the base, and from where it is read."""

import shutil

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import Trainer, TrainingArguments

from peft_sparse import MaskLoRAConfig, PruningCallback, PruningCycles, SparseTrainer, ZeroGuardCallback
from peft_sparse.training.checkpoints import BASE_NAME, last_complete_checkpoint, missing_part

from checks import assert_same_weights
from conftest import Samples, tiny
from trainers import StopAt, arguments


# Adapters on some of the layers that are pruned, and a copy of another one.
CONFIG = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
CYCLES = {"sparsity": 0.75, "pruning_schedule": "cycles", "pruning_rounds": 3, "save_strategy": "steps"}


def adapted(way=get_peft_model, family="llama", **options):
    torch.manual_seed(0)
    model, config = tiny(family), MaskLoRAConfig(**CONFIG | options)
    if way == "add_adapter":
        model.add_adapter(config)
        return model
    return inject_adapter_in_model(config, model) if way == "inject" else get_peft_model(model, config)


def cycles(path, model=None, callbacks=(), **options):
    args = arguments(path, **{"save_steps": 1} | CYCLES | options)
    return SparseTrainer(model or adapted(), args, train_dataset=Samples(), callbacks=list(callbacks))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run of cycles, with a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("run")
    trainer = cycles(folder)
    trainer.train()
    return folder, trainer.model


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES = {
    "trainer_state.json": "trainer_state.json is missing or cut off",
    "adapter_model.safetensors": r"\*model\*.safetensors is missing|adapter_model.safetensors is cut off",
    BASE_NAME: "pruned_base.safetensors is (missing|cut off)",
    "optimizer.pt": r"\*?optimizer.* is (missing|cut off)",
    "scheduler.pt": "scheduler.pt is (missing|cut off)",
    "rng_state.pth": "rng_state.* is (missing|cut off)",
    "training_args.bin": "training_args.bin is cut off",
}
HURT = [
    (name, damage) for name in DAMAGES for damage in ("gone", "cut") if (name, damage) != ("training_args.bin", "gone")
]


@pytest.mark.parametrize(("name", "damage"), HURT)
def test_a_checkpoint_that_is_not_complete_is_passed_over(run, tmp_path, caplog, name, damage):
    for step in (2, 3):
        shutil.copytree(run[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    hurt = tmp_path / "checkpoint-3" / name
    assert missing_part(hurt.parent) is None
    cut(hurt) if damage == "cut" else hurt.unlink()
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-2"
    assert "resumes from checkpoint-2." in caplog.text
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=rf"found checkpoint-3 \(({DAMAGES[name]})\)"):
        last_complete_checkpoint(tmp_path)


def test_training_resumes_from_the_last_complete_checkpoint(run, tmp_path):
    for step in (3, 5):
        shutil.copytree(run[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-5" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-new").mkdir()
    resumed = cycles(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed.model, run[1])


@pytest.mark.parametrize("options", [{}, {"save_only_model": True}], ids=["all", "only the model"])
def test_checkpoints_of_plain_trainers_are_complete(tmp_path, llama, options):
    args = arguments(tmp_path, TrainingArguments, save_strategy="steps", save_steps=2, max_steps=2, **options)
    Trainer(llama, args, train_dataset=Samples()).train()
    assert missing_part(tmp_path / "checkpoint-2", only_weights=bool(options)) is None
    index = tmp_path / "checkpoint-2" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert "parts of model.safetensors.index.json" in missing_part(index.parent, only_weights=bool(options))


def test_the_base_is_there_before_older_checkpoints_are_deleted(tmp_path, monkeypatch):
    seen = []
    real = transformers.trainer.rotate_checkpoints

    def rotates(output_dir, **options):
        seen.append(all((folder / BASE_NAME).is_file() for folder in tmp_path.glob("checkpoint-*")))
        real(output_dir, **options)

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", rotates)
    cycles(tmp_path, save_total_limit=1).train()
    assert seen == [True] * 6
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize("stop", [1, 3])
def test_the_base_is_read_from_the_checkpoint_that_is_resumed(run, tmp_path, stop):
    """Not from `output_dir`, where another run has a checkpoint of the same name."""
    cycles(tmp_path / "out", callbacks=[StopAt(3)], seed=5, criterion="random").train()
    moved = shutil.copytree(run[0] / f"checkpoint-{stop}", tmp_path / "elsewhere")
    resumed = cycles(tmp_path / "out")
    resumed.train(resume_from_checkpoint=str(moved))
    assert_same_weights(resumed.model, run[1])


def plain(path, **options):
    args = arguments(path, TrainingArguments, save_strategy="steps", save_steps=3, **options)
    callbacks = [PruningCallback(0.75, schedule=PruningCycles(3)), ZeroGuardCallback()]
    return Trainer(adapted(), args, train_dataset=Samples(), callbacks=callbacks)


def test_a_plain_trainer_resumes_from_its_own_folder_and_refuses_the_base_of_another_run(tmp_path):
    whole = plain(tmp_path / "one")
    whole.train()
    resumed = plain(tmp_path / "one")
    resumed.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-3"))
    assert_same_weights(resumed.model, whole.model)
    plain(tmp_path / "other", seed=5, learning_rate=0.1).train()
    with pytest.raises(ValueError, match="are not those on which the resumed adapter was trained. Resume from"):
        plain(tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-3"))


def test_a_base_that_was_changed_on_disk_is_refused(run, tmp_path):
    folder = shutil.copytree(run[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    shutil.copy(run[0] / "checkpoint-5" / BASE_NAME, folder)
    with pytest.raises(ValueError, match="are not those on which the resumed adapter was trained"):
        cycles(tmp_path).train(resume_from_checkpoint=True)


WAYS = {
    "add_adapter": ("add_adapter", {}),
    "add_adapter with a copy": ("add_adapter", {"modules_to_save": ["down_proj"]}),
    "injected": ("inject", {}),
    "a copy": (get_peft_model, {"modules_to_save": ["down_proj"]}),
    "biases": (get_peft_model, {"bias": "all", "family": "opt"}),
    "biases and add_adapter": ("add_adapter", {"bias": "all", "family": "opt"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_cycles_resume_however_adapters_were_attached(tmp_path, way):
    attach, options = WAYS[way]
    whole = cycles(tmp_path, adapted(attach, **options), save_steps=3)
    whole.train()
    resumed = cycles(tmp_path, adapted(attach, **options), save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_weights(resumed.model, whole.model)


def test_pruned_weights_that_are_trained_beside_adapters_resume(tmp_path):
    def made():
        model = adapted()
        model.base_model.model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
        return cycles(tmp_path, model, save_steps=3)

    whole, resumed = made(), made()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_weights(resumed.model, whole.model)


def test_one_pruning_with_adapters_of_add_adapter_resumes(tmp_path):
    def made():
        args = arguments(
            tmp_path, sparsity=0.5, criterion="wanda", calibration_samples=4, save_strategy="steps", save_steps=3
        )
        return SparseTrainer(adapted("add_adapter"), args, train_dataset=Samples())

    whole, resumed = made(), made()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_weights(resumed.model, whole.model)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    cycles(tmp_path, adapted("add_adapter"), save_steps=3).train()
    other = tiny("llama")
    other.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = SparseTrainer(other, arguments(tmp_path), train_dataset=Samples())
    with pytest.raises(ValueError, match="such tensors\\), and the adapter of the model does not. Attach the adapter"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_the_best_adapter_of_add_adapter_is_loaded_at_the_end(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.5}
    args = arguments(tmp_path, **best, sparsity=0.5, save_strategy="steps", save_steps=1, save_total_limit=1)
    trainer = SparseTrainer(adapted("add_adapter"), args, train_dataset=Samples(), eval_dataset=Samples(4))
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(losses) < losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses))
