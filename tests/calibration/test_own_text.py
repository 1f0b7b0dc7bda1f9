import itertools

import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from peft_sparse import prune
from peft_sparse.calibration.own_text import generate_sequences

from conftest import tiny
from texts import character_tokenizer, conversation, says


TOKENIZER = character_tokenizer()
PROMPTS = ["ONE", "A LONGER ONE", "X"]
GREEDY = {"temperature": 1e-4}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_token_is_sampled_from_the_model_after_those_before_it(family):
    """At a temperature near zero it is the most likely one, whatever other texts are in the batch."""
    model = tiny(family)
    sequences = generate_sequences(model, TOKENIZER, 5, 20, prompts=PROMPTS, batch_size=3, **GREEDY)
    assert sequences.shape == (5, 20)
    for row, prompt in zip(sequences, itertools.cycle(PROMPTS)):
        start = len(prompt)
        assert TOKENIZER.decode(row[:start]) == prompt
        with torch.no_grad():
            likely = model(row[None]).logits[0].argmax(-1)
        assert torch.equal(row[start:], likely[start - 1 : -1])


def test_a_mark_of_the_end_does_not_end_a_text(llama):
    expected = generate_sequences(llama, TOKENIZER, 1, 20, prompts=["ONE"], **GREEDY)
    llama.generation_config.eos_token_id = int(expected[0, 5])
    assert torch.equal(generate_sequences(llama, TOKENIZER, 1, 20, prompts=["ONE"], **GREEDY), expected)


def test_texts_from_nothing_begin_with_a_random_token_or_the_tokenizers_own(llama):
    sequences = generate_sequences(llama, TOKENIZER, 20, 4)
    assert sequences.shape == (20, 4)
    assert len(set(sequences[:, 0].tolist())) > 5
    assert not {60, TOKENIZER.unk_token_id} & set(sequences[:, 0].tolist())

    class Beginning(type(TOKENIZER)):
        def __call__(self, text, **options):
            return {"input_ids": [7]} if text == "a" else super().__call__(text, **options)

    tokenizer = character_tokenizer(bos_token="'")
    tokenizer.__class__ = Beginning
    assert set(generate_sequences(llama, tokenizer, 6, 4)[:, 0].tolist()) == {7}


def test_the_seed_decides_and_nothing_else_changes(llama):
    llama.train()
    state = torch.get_rng_state()
    one, same, other = (generate_sequences(llama, TOKENIZER, 4, 12, seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert llama.training


def test_settings_of_the_model_do_not_narrow_its_distribution_and_options_do(llama):
    llama.generation_config.top_k = 1
    free = generate_sequences(llama, TOKENIZER, 8, 12, prompts=["ONE"])
    assert len({tuple(row.tolist()) for row in free}) == 8
    narrow = generate_sequences(llama, TOKENIZER, 8, 12, prompts=["ONE"], top_k=1)
    assert len({tuple(row.tolist()) for row in narrow}) == 1


def test_adapters_write_as_well(llama):
    expected = generate_sequences(llama, TOKENIZER, 2, 12)
    model = get_peft_model(llama, LoraConfig(target_modules="all-linear"))
    assert torch.equal(generate_sequences(model, TOKENIZER, 2, 12), expected)


def test_answers_to_conversations_fill_sequences_whose_template_does_not_count(llama):
    prompts = Dataset.from_dict({"messages": [[says("user", "WHY?")], conversation("HOW?", "OLD ANSWER")]})
    rows = generate_sequences(llama, TOKENIZER, 3, 50, prompts=prompts)
    assert len(rows) == 3
    for row in rows:
        text = TOKENIZER.decode(row["input_ids"])
        assert len(row["input_ids"]) == len(row["token_mask"]) == 50
        assert text.startswith("<S>BE KIND</S><USER>")
        assert row["token_mask"][:20].sum() == 0
        assert TOKENIZER.decode(row["input_ids"][row["token_mask"].bool()]).startswith(("WHY?", "HOW?"))
        assert "OLD ANSWER" not in text
    only = generate_sequences(llama, TOKENIZER, 3, 50, prompts=prompts, assistant_only=True)
    for row, answers in zip(rows, only, strict=True):
        assert torch.equal(row["input_ids"], answers["input_ids"])
        assert answers["token_mask"].sum() in (row["token_mask"].sum() - 4, row["token_mask"].sum() - 8)


def test_an_answer_ends_where_the_model_ends_it(llama):
    options = {"prompts": [[says("user", "WHY?")]], "batch_size": 1, "assistant_only": True}
    (whole,) = generate_sequences(llama, TOKENIZER, 1, 90, **options)
    answer = whole["input_ids"][whole["token_mask"].bool()]
    first = int(answer.ne(answer[0]).nonzero()[0])
    end = int(answer[first])
    llama.generation_config.eos_token_id = [end, 60]
    (cut,) = generate_sequences(llama, TOKENIZER, 1, 90, **options)
    text = TOKENIZER.decode(cut["input_ids"])
    assert text.count(f"<ASSISTANT>{TOKENIZER.decode(answer[: first + 1])}<S>") == 1
    assert cut["token_mask"][text.index("<ASSISTANT>") + 11 :][first] == 0, "the mark of the end does not count"


def test_the_text_prunes_the_model_that_wrote_it(llama):
    report = prune(llama, 0.5, generate_sequences(llama, TOKENIZER, 4, 12), criterion="wanda")
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


def test_an_offloaded_model_writes_as_one_in_memory(llama):
    tokenizer = character_tokenizer()
    expected = generate_sequences(llama, tokenizer, 2, 8)
    assert torch.equal(generate_sequences(cpu_offload(tiny("llama")), tokenizer, 2, 8), expected)
