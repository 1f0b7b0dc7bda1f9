"""`SparseTrainingArguments(recalibrate_norms=True)`: after pruning, and after training with the adapters merged."""

import copy

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from peft_sparse import MaskLoRAConfig, SparseTrainer, sparsity
from peft_sparse.calibration.norms import recalibrate_norms

from trainers import arguments


SAMPLES = 24


@pytest.fixture
def resnet():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config)


@pytest.fixture
def images():
    """A data set that is sorted by class, as folders of images are."""
    labels = torch.arange(SAMPLES) * 3 // SAMPLES
    return [
        {"pixel_values": torch.randn(3, 16, 16) * (label + 1) + label, "labels": label} for label in labels.unbind()
    ]


def statistics(model):
    return {name: b.clone() for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))}


def assert_measured_on(model, samples):
    """The statistics are those of `samples`."""
    expected = copy.deepcopy(model)
    recalibrate_norms(expected, [{"pixel_values": torch.stack([sample["pixel_values"] for sample in samples])}])
    for name, value in statistics(model).items():
        torch.testing.assert_close(value, statistics(expected)[name], rtol=1e-3, atol=1e-4, msg=name)


def test_after_pruning_on_samples_of_all_classes(resnet, images, tmp_path):
    args = arguments(tmp_path, sparsity=0.7, recovery="none", recalibrate_norms=True, calibration_samples=6)
    trainer = SparseTrainer(resnet, args, train_dataset=images)
    trainer.train()
    assert_measured_on(resnet, images[::4])
    assert trainer.norms_report.samples == 6
    assert len({int(sample["labels"]) for sample in images[::4]}) == 3


@pytest.mark.parametrize("masked", ["always", "merge"])
def test_after_training_for_the_merged_model(resnet, images, tmp_path, masked):
    config = MaskLoRAConfig(r=2, target_modules=r".*convolution", train_norms=True, masking=masked, init_weights=False)
    options = {"sparsity": 0.7, "recalibrate_norms": True, "calibration_samples": SAMPLES, "max_steps": 2}
    trainer = SparseTrainer(resnet, arguments(tmp_path, **options), train_dataset=images, peft_config=config)
    trainer.train()
    trainer.save_merged_model(str(tmp_path / "merged"))
    merged = ResNetForImageClassification.from_pretrained(tmp_path / "merged")
    assert sparsity(merged) == pytest.approx(0.7, abs=0.01)
    assert_measured_on(merged, images)
    unloaded = trainer.model.merge_and_unload()
    for name, value in statistics(merged).items():
        assert torch.equal(value, statistics(unloaded)[name]), name


def test_after_each_pruning_of_a_schedule_and_after_reconstruction(resnet, images, tmp_path, monkeypatch):
    seen = []
    original = SparseTrainer._recalibrate
    options = {"sparsity": 0.7, "recalibrate_norms": True, "calibration_samples": 8}
    args = arguments(tmp_path, pruning_schedule="cycles", pruning_rounds=2, **options)
    trainer = SparseTrainer(copy.deepcopy(resnet), args, train_dataset=images)
    trainer._pruning.after_pruning = lambda model: seen.append(round(sparsity(model), 1))
    trainer.train()
    assert len(seen) == 2
    assert_measured_on(trainer.model, images[::3])

    def noted(trainer):
        original(trainer)
        seen.append("reconstructed")

    monkeypatch.setattr(SparseTrainer, "_recalibrate", noted)
    args = arguments(tmp_path, recovery="reconstruct", max_steps=2, **options)
    trainer = SparseTrainer(resnet, args, train_dataset=images)
    trainer.train()
    assert seen[2:] == ["reconstructed"]
    assert_measured_on(resnet, images[::3])


def test_without_it_the_statistics_of_the_pruned_model_stay(resnet, images, tmp_path):
    before = statistics(resnet)
    trainer = SparseTrainer(
        resnet, arguments(tmp_path, sparsity=0.7, recovery="none", calibration_samples=6), train_dataset=images
    )
    trainer.train()
    assert trainer.norms_report is None
    assert all(torch.equal(value, before[name]) for name, value in statistics(resnet).items())


def test_the_order_of_training_is_the_same_with_and_without_it(resnet, images, tmp_path):
    losses = []
    for wanted in (False, True):
        args = arguments(tmp_path, sparsity=0.5, recalibrate_norms=wanted, calibration_samples=8)
        trainer = SparseTrainer(copy.deepcopy(resnet), args, train_dataset=images)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
