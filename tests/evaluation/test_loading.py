import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_sparse.evaluation import load_model
from peft_sparse.evaluation.loading import load_tokenizer, short_names, weights_size

from evaluated import save_adapter, save_dense, save_pruned


def test_an_adapter_comes_with_its_base_and_the_tokenizer_of_that(tmp_path):
    base = save_pruned(tmp_path / "pruned")
    adapter = save_adapter(tmp_path / "tuned", base)
    loaded = load_model(adapter, device="cpu")
    assert isinstance(loaded.model, PeftModel)
    assert not loaded.model.training
    assert (loaded.name, loaded.base) == ("tuned", "pruned")
    assert loaded.tokenizer("AB")["input_ids"] == load_tokenizer(base)("AB")["input_ids"]
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens).logits, expected(tokens).logits)


def test_a_base_that_has_moved_can_be_named(tmp_path):
    adapter = save_adapter(tmp_path / "tuned", save_pruned(tmp_path / "pruned"))
    (tmp_path / "pruned").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="Expected the base of the adapter"):
        load_model(adapter, device="cpu")
    loaded = load_model(adapter, base=str(tmp_path / "moved"), device="cpu")
    assert loaded.base == "moved"
    assert loaded.tokenizer is not None


def test_the_size_is_that_of_the_weights(tmp_path):
    folder = tmp_path / "dense"
    dense = save_dense(folder)
    assert weights_size(dense) == (folder / "model.safetensors").stat().st_size
    for name in ("optimizer.pt", "training_args.bin", "pytorch_model.bin"):
        (folder / name).write_bytes(b"0" * 1000)
    assert weights_size(dense) == (folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors").unlink()
    assert weights_size(dense) == 1000
    assert weights_size("nobody/such-model") is None


def test_the_dtype_is_that_of_the_file_or_the_one_asked_for(tmp_path):
    dense = save_dense(tmp_path / "dense")
    assert load_model(dense, device="cpu").model.dtype == torch.float32
    assert load_model(dense, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_names_are_as_long_as_needed_and_hide_the_machine(tmp_path):
    for folder in ("a/final", "b/final", "b/first"):
        (tmp_path / folder).mkdir(parents=True)
    paths = [tmp_path / "a/final", tmp_path / "b/final"]
    assert short_names(paths) == ["a/final", "b/final"]
    assert short_names([tmp_path / "a/final", str(tmp_path / "b/first"), "user/model"]) == [
        "final",
        "first",
        "user/model",
    ]
