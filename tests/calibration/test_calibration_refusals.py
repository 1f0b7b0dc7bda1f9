"""Every refusal of `calibration/`, with its words."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset
from peft import HRAConfig, get_peft_model
from torch import nn
from transformers import AutoModel, DynamicCache

from peft_sparse import pack_sequences, perplexity, prune, sample_sequences
from peft_sparse.calibration.label_positions import label_offset
from peft_sparse.calibration.norms import recalibrate_norms
from peft_sparse.calibration.own_text import generate_sequences
from peft_sparse.training.distillation import ADVICE

from conftest import CONFIGS, tiny
from refusing import TOKENS, Block, Net, batches, flap, in_order, llama, nan_norm, padded, rebuild, wanda
from texts import character_tokenizer, conversation


CHARACTERS = character_tokenizer()
CHAT = conversation("WHY?", "SO.")


def zero_norm(model):
    model.model.layers[1].input_layernorm.weight.zero_()


def nan_head(model):
    model.lm_head.weight[0, 0] = torch.nan


def headless_gradients():
    prune(AutoModel.from_config(CONFIGS["llama"]), 0.5, criterion="gblm", calibration=TOKENS)


def labels_without_effect():
    def loss_of(inputs):
        outputs = model(input_ids=inputs["input_ids"])
        return outputs.logits.mean(), outputs

    model = llama()
    label_offset(loss_of, {"input_ids": TOKENS, "labels": TOKENS}, "Llama", ADVICE)


class Unmasked(nn.Module):
    def forward(self, input_ids):
        return input_ids


class TwoTowers(torch.nn.Module):
    """Of which no input comes to the second."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (
            torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(4, 4))]) for _ in range(2)
        )  # fmt: skip

    def forward(self, x):
        return self.one[0](x)


class Stairs(torch.nn.Module):
    """Does something between its blocks."""

    def __init__(self, in_place):
        super().__init__()
        self.steps = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(3))
        self.in_place = in_place

    def forward(self, x):
        for step in self.steps:
            x = step(x)
            x = x.add_(1) if self.in_place else x + 1
        return x


class Attending(Block):
    """Of which accelerate loads no weights: the layer is not called."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)


def attending(layers, hidden):
    return in_order(layers, layers[0].attention(hidden, hidden, hidden, need_weights=False)[0])


def words(text, **options):
    return {"input_ids": text.split()}


def pruned():
    model = llama()
    prune(model, 0.5)
    return model


def unused_layer(model):
    model.model.layers[0].idle = nn.Linear(4, 4)


def ignored():
    """A model that calls a layer and does nothing with what it returns."""
    model = llama(unused_layer)

    def call_idle(*args):
        model.model.layers[0].idle(torch.ones(1, 4))

    model.model.layers[0].mlp.register_forward_hook(call_idle)
    return model


def is_unperturbed(block, hidden, output):
    return torch.equal(output, nn.functional.linear(hidden, block.fc.weight, block.fc.bias))


def another_by_values(layers, hidden):
    output = layers[0](hidden)
    return layers[1 if is_unperturbed(layers[0], hidden, output) else 2](output)


def fewer_by_values(layers, hidden):
    output = layers[0](hidden)
    return output if is_unperturbed(layers[0], hidden, output) else layers[1](output)


def with_a_number(layers, hidden):
    hidden = layers[0](hidden)
    return layers[1](hidden, other=hidden.norm().item())


def reaching_in(layers, hidden):
    return layers[0].fc(in_order(layers, hidden))


class Wrapping(Block):
    def forward(self, holder):
        return SimpleNamespace(hidden=super().forward(holder.hidden))


def in_objects(layers, hidden):
    return in_order(layers, SimpleNamespace(hidden=hidden)).hidden


class Remembering(Block):
    """Adds what it was given before."""

    last = 0

    def forward(self, hidden):
        before, self.last = self.last, hidden
        return self.fc(hidden) + before


def in_pairs(layer, hidden):
    """Call `layer` on the sum of two tokens each, if their number is even."""
    if hidden.shape[1] % 2:
        return layer(hidden)
    return layer(hidden[:, ::2] + hidden[:, 1::2]).repeat_interleave(2, 1)


class Pairing(Block):
    def forward(self, hidden):
        return in_pairs(self.fc, hidden)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, hidden):
        chosen, outputs = self.router(hidden).argmax(-1), torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            outputs[chosen == index] = expert(hidden[chosen == index])
        return outputs


class PairingMixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixture = Mixture()

    def forward(self, hidden):
        return in_pairs(self.mixture, hidden)


def no_token_counts():
    wanda(llama(), calibration=[{"input_ids": TOKENS, "token_mask": torch.zeros_like(TOKENS)}])


def a_mask_of_other_tokens():
    wanda(Net(in_order), calibration=[batches(8)[0] | {"attention_mask": padded(9)[0]["attention_mask"]}])


class Pools(nn.Module):
    """Has a second stack, whose tokens are two tokens of the first one each."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Net(in_order), Net(in_order)

    def forward(self, input_ids, attention_mask=None):
        x = in_order(self.first.layers, self.first.embed(input_ids))
        return in_order(self.second.layers, x[:, ::2] + x[:, 1::2])


def sharing_across_stacks():
    model = Pools()
    model.second.layers[0].fc = model.first.layers[0].fc
    return model


def pooled_padding():
    ids = TOKENS % 8
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    prune(Pools().eval(), 0.5, [{"input_ids": ids, "attention_mask": mask}], criterion="wanda")


class Normed(nn.Module):
    """A model with two norms, of which some batches reach one."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.one(x)
        return x if len(x) < 3 else self.two(x)


def sharded_norms():
    model = Normed()
    model.two.weight.ds_tensor = model.two.weight.detach()
    return model


REFUSALS = [
    (
        lambda: wanda(get_peft_model(llama(), HRAConfig(target_modules=["q_proj"], r=2, init_weights=False))),
        ValueError,
        "The adapter of .*q_proj', a HRALinear, multiplies the weight with other inputs .* Merge the adapter, switch",
    ),
    (lambda: pack_sequences(["A"], CHARACTERS, 0), ValueError, "`length` must be a whole number of at least 1, got 0"),
    (lambda: sample_sequences(["A"], CHARACTERS, 2.5), ValueError, "`count` must be a whole number .* got 2.5"),
    (
        lambda: wanda(tiny("gpt2"), calibration=[{"input_ids": torch.zeros(1, n, dtype=torch.long)} for n in (8, 99)]),
        ValueError,
        r"GPT2LMHeadModel does not run on batch 1 of .* {'input_ids': \(1, 99\)}. Give .* It raised IndexError: index",
    ),
    (
        lambda: wanda(cpu_offload(Net(attending, Attending)), target_modules=["fc"]),
        ValueError,
        "Net uses weights that accelerate has offloaded, outside of calls of .* in `preload_module_classes`",
    ),
    (lambda: recalibrate_norms(llama(), TOKENS), ValueError, "such as BatchNorm, and Llama.* has none. Other norms"),
    (lambda: recalibrate_norms(Normed(), []), ValueError, "`batches` holds no batch. Give at least one sequence"),
    (
        lambda: recalibrate_norms(Normed(), torch.ones(3, 5)),
        ValueError,
        "Normed does not run on batch 0 of the data, .* Give what .* It raised RuntimeError",
    ),
    (
        lambda: recalibrate_norms(Normed(), torch.ones(2, 4)),
        ValueError,
        "No batch reaches 1 of the 2 layers with running statistics, such as 'two'. Give batches",
    ),
    (
        lambda: recalibrate_norms(Normed(), torch.ones(3, 4) * torch.nan),
        ValueError,
        "statistics of 'one' are not finite. Expected inputs that are finite, and at least two values",
    ),
    (lambda: recalibrate_norms(sharded_norms(), torch.ones(3, 4)), ValueError, "its weights are sharded. Call"),
    (
        lambda: recalibrate_norms(Normed().to("meta"), torch.ones(3, 4)),
        ValueError,
        "statistics of 'one' are on the meta device, where nothing can be written. Load the model",
    ),
    (
        labels_without_effect,
        ValueError,
        "Expected a loss that compares the label .* correlations 0.00 and 0.00. Add `shift_labels` to the batches",
    ),
    (
        pooled_padding,
        ValueError,
        r"'attention_mask' marks padding, which changes states of shape .* that come to 'second.layers.0', .* Give",
    ),
    (
        lambda: prune(llama(), 0.5, criterion="wanda", calibration=TOKENS.float()),
        ValueError,
        "Expected `calibration` as token ids, .* got torch.float32",
    ),
    (lambda: prune(llama(), 0.5, criterion="wanda", calibration=TOKENS[0]), ValueError, r"of shape \(8,\)"),
    (lambda: prune(llama(), 0.5, criterion="wanda", calibration=[]), ValueError, "`calibration` holds no batch"),
    (
        lambda: wanda(llama(), calibration=[{"input_ids": TOKENS[0].tolist(), "attention_mask": [1] * 5}]),
        ValueError,
        r"Expected `attention_mask` of `calibration` .* got shape \(1, 5\) for tokens of shape \(1, 8\). Cut both to",
    ),
    (lambda: wanda(llama(), batch_size=0), ValueError, "`batch_size` must be a whole number of at least 1, got 0"),
    (
        lambda: wanda(llama(), calibration=TOKENS + 61),
        ValueError,
        r"Expected token ids of `calibration` from 0 to 60, for which LlamaForCausalLM has embeddings, got \d\d",
    ),
    (lambda: wanda(llama(), calibration=iter([])), ValueError, "holds no batch. .* An iterator gives its data once"),
    (
        lambda: wanda(llama(), calibration=["a text", "another"]),
        ValueError,
        r"Expected `calibration` as token ids or model inputs, got text. .*: `pack_sequences\(texts, tokenizer\)`",
    ),
    (
        lambda: wanda(llama(), calibration=Dataset.from_dict({"text": ["a", "b"], "idx": [0, 1]})),
        ValueError,
        r"got only texts, under 'text'. .*: `pack_sequences\(data\['text'\], tokenizer\)`",
    ),
    (
        lambda: wanda(llama(), calibration={"train": Dataset.from_dict({"input_ids": [[1]]})}),
        ValueError,
        r"as one split of a data set, got a dict of 1 splits. Choose one, such as `data\['train'\]`",
    ),
    (
        lambda: wanda(llama(), calibration=[{}]),
        ValueError,
        "as a dict of inputs of LlamaForCausalLM with at least one tensor, got an empty dict. It takes 'input_ids', ",
    ),
    (
        lambda: wanda(llama(), calibration=[1, 2, 3]),
        ValueError,
        "of token ids or of pairs .*, got int. .* put a single sequence into a list",
    ),
    (
        lambda: wanda(llama(), calibration=3),
        ValueError,
        r"Expected `calibration` as token ids \(sequences, tokens\), a dict of model inputs, .*, got int",
    ),
    (
        lambda: wanda(llama(), calibration=[{"input_ids": TOKENS.float()}]),
        ValueError,
        "Expected `input_ids` of `calibration` as int64 or int32, got torch.float32 of shape",
    ),
    (
        lambda: wanda(llama(), calibration=[(TOKENS, torch.ones_like(TOKENS))]),
        ValueError,
        r"as \(input,\) or \(input, target\), got 2 tensors that may be masks. Give dicts",
    ),
    (
        lambda: wanda(llama(), calibration={"input_ids": [[1, 2], [3]], "attention_mask": [[1]]}),
        ValueError,
        "Expected the same number of sequences under every name of `calibration`, got {'input_ids': 2, 'attention_m",
    ),
    (
        lambda: perplexity(Unmasked(), [{"input_ids": [[1, 2], [3]]}]),
        ValueError,
        "Expected the sequences of a batch of `sequences` to be equally long, .* 'input_ids' holds .* one by one",
    ),
    (
        lambda: wanda(llama(), calibration={"input_ids": TOKENS, "token_mask": torch.ones(4, 7).bool()}),
        ValueError,
        r"`token_mask` of `calibration` as a tensor .* of the shape \(4, 8\) .* got torch.bool of shape \(4, 7\)",
    ),
    (
        lambda: prune(llama(), 0.5, [{"input_ids": TOKENS, "past_key_values": DynamicCache()}], criterion="gblm"),
        ValueError,
        '"gblm" sums over single sequences, .* tensors of another first dimension: .* Give batches of one sequence',
    ),
    (
        lambda: wanda(llama(), activations="ram"),
        ValueError,
        "`activations` must be one of 'device', 'cpu', 'disk', got",
    ),
    (
        lambda: prune(llama(nan_norm), 0.5, criterion="wanda", calibration=TOKENS),
        ValueError,
        "Expected finite inputs, but those of layer 'model.layers.1.self_attn.q_proj' hold NaN",
    ),
    (
        lambda: wanda(llama(), calibration=[{"inputs_embeds": torch.full((1, 4, 16), torch.nan)}]),
        ValueError,
        "Expected finite inputs, but those of layer 'model.layers.0.self_attn.q_proj' hold NaN",
    ),
    (
        lambda: wanda(llama(zero_norm)),
        ValueError,
        "All inputs of layer 'model.layers.1.self_attn.q_proj' are zero, so they say nothing about its weights. Check",
    ),
    (
        lambda: wanda(llama(unused_layer)),
        ValueError,
        r"No calibration batch multiplies 'model.layers.0.idle' with inputs .* `exclude_modules=\['idle'\]`",
    ),
    (headless_gradients, ValueError, '"gblm" needs a loss, and LlamaModel returned none. Give .* with `labels`'),
    (
        lambda: prune(ignored(), 0.5, criterion="gblm", calibration=TOKENS),
        ValueError,
        r"No gradient reached 'model.layers.0.idle' \(1 such weights\)",
    ),
    (
        lambda: prune(llama(nan_head), 0.5, criterion="gblm", calibration=TOKENS),
        ValueError,
        "The gradient of 'model.layers.2.mlp.down_proj' is not finite. Run the model in float32",
    ),
    (
        lambda: sample_sequences(["a b c", "a b"], words, count=2, length=2),
        ValueError,
        "Expected 2 documents of more than 2 tokens in `documents`, found 1 among 2. Give more",
    ),
    (
        lambda: pack_sequences(["a b", "c"], words, length=4),
        ValueError,
        "Expected a text of at least one sequence of 4 tokens, got 3 tokens",
    ),
    (
        lambda: pack_sequences([TOKENS[0]], words, length=1),
        TypeError,
        "Expected texts to be joined, got a sequence of tokens. Use `sample_sequences`, which also takes",
    ),
    (
        lambda: sample_sequences([3.5], words, 1, 2),
        TypeError,
        r'Expected documents as texts, as conversations .* got float. .* such as `dataset\["text"\]`',
    ),
    (
        lambda: sample_sequences(Dataset.from_dict({"content": ["a b c"], "id": [0]}), words, 1, 2),
        ValueError,
        "a text, with messages or .* 'text', .* got {'content': str, 'id': int}. Rename the column that is meant",
    ),
    (
        lambda: sample_sequences(Dataset.from_dict({"text": ["a b c"], "messages": [CHAT]}), words, 1, 2),
        ValueError,
        "under one of the names .* got {'text': str, 'messages': list}. .* leave out others by `dataset.select_col",
    ),
    (
        lambda: sample_sequences(["a b c"], words, 1, 2, shares={"c4": 1}),
        ValueError,
        "`shares` divides the sequences among several sources, got one source .list.. Give a dict",
    ),
    (
        lambda: sample_sequences({"train": ["a b c"], "test": ["a b c"]}, words, 1, 2),
        ValueError,
        r"a number for each source \('train', 'test'\), got none. If these are the splits of one data set, choose one",
    ),
    (
        lambda: sample_sequences({"a": ["a b c"], "b": ["a b c"]}, words, 1, 2, shares={"a": 1.5, "b": -0.5}),
        ValueError,
        "Expected positive numbers in `shares`, got {'a': 1.5, 'b': -0.5}. Leave out unused sources",
    ),
    (
        lambda: sample_sequences({"a": ["a b c"], "b": ["a b c"]}, words, 1, 2, shares={"a": 9, "b": 1}),
        ValueError,
        "Expected at least one sequence of each source, got none of 'b': `count` is 1. Raise `count`, or leave out",
    ),
    (
        lambda: sample_sequences({"a": [CHAT], "b": ["A B"]}, CHARACTERS, 2, 90, shares={"a": 1, "b": 1}),
        ValueError,
        r"conversations in `documents\['a'\]` that fill 1 sequences of 90 tokens, and 1 conversations fill 0. Give",
    ),
    (
        lambda: sample_sequences([CHAT] * 9, CHARACTERS, 2, 20),
        ValueError,
        "with tokens that count, and in 3 sequences of 20 tokens there was none, .* Raise `length`, or leave out",
    ),
    (
        lambda: sample_sequences([[{"from": "human", "value": "HI"}]], CHARACTERS, 1, 2),
        ValueError,
        "message 0 of a conversation as a dict with the texts `role` and `content`, .* got {'from': str, 'value': st",
    ),
    (
        lambda: sample_sequences(Dataset.from_dict({"messages": [CHAT, []]}), CHARACTERS, 9, 2),
        ValueError,
        "message 0 of a conversation as a dict with the texts `role` and `content`, .* got {}. Convert",
    ),
    (
        lambda: sample_sequences([CHAT], character_tokenizer("{{ messages[0]['content'] | lower }}"), 1, 2),
        ValueError,
        r"as they are, up to spaces at their ends. That of \w+ changes this .* of 2 messages, .* Give the texts in",
    ),
    (
        lambda: generate_sequences(pruned(), CHARACTERS, 1, 8),
        ValueError,
        "Expected the dense model, and 50.0% of the weights of this model are zero. .* Generate before pruning",
    ),
    (
        lambda: generate_sequences(llama(), CHARACTERS, 2, 8, prompts=["A", CHAT]),
        ValueError,
        "all prompts as texts, or all as conversations, got a text and a conversation. Call `generate_sequences` once",
    ),
    (
        lambda: generate_sequences(llama(), CHARACTERS, 1, 8, prompts=[]),
        ValueError,
        "Expected at least one prompt, got none. Leave out `prompts` to generate from nothing",
    ),
    (
        lambda: generate_sequences(tiny("t5"), CHARACTERS, 1, 8),
        ValueError,
        "Expected a causal language model that can generate, got T5ForConditionalGeneration. Load it by",
    ),
    (
        lambda: generate_sequences(llama(), CHARACTERS, 1, 8, topp=0.9),
        ValueError,
        "Expected options of `GenerationConfig`, got 'topp'. Its options are listed",
    ),
    (
        lambda: generate_sequences(llama(), CHARACTERS, 1, 8, prompts=["A LONG PROMPT"]),
        ValueError,
        "Expected prompts of 1 to 7 tokens, because sequences have 8, got one of 13. Give the beginnings",
    ),
    (
        lambda: perplexity(llama(), TOKENS.float()),
        ValueError,
        "Expected `sequences` as token ids, .* got torch.float32",
    ),
    (lambda: perplexity(llama(), "text"), ValueError, "Expected `sequences` as token ids .* got text. Make token ids"),
    (lambda: perplexity(llama(), ["text"]), ValueError, "Expected `sequences` as token ids .* got text. Make token"),
    (lambda: perplexity(llama(), []), ValueError, "`sequences` holds no batch. Give at least one sequence"),
    (lambda: flap(activations="ram"), ValueError, "`activations` must be one of 'device', 'cpu', 'disk', got 'ram'"),
    (lambda: rebuild(llama(), activations="gpu"), ValueError, "`activations` must be one of 'device', .* got 'gpu'"),
    (
        lambda: wanda(TwoTowers(), calibration=[{"x": torch.ones(1, 2, 4)}]),
        ValueError,
        "No calibration batch runs the blocks of 'two', or only .* Give batches that do, .* or leave these layers",
    ),
    (
        lambda: wanda(Stairs(in_place=False), calibration=[{"x": torch.ones(1, 2, 4)}]),
        ValueError,
        "Between 'steps.0' and 'steps.1' the model changes the hidden states, .* Prune by a criterion that needs no",
    ),
    (
        lambda: wanda(Stairs(in_place=True), calibration=[{"x": torch.ones(1, 2, 4)}]),
        ValueError,
        "Between 'steps.0' and 'steps.1' the model changes the hidden states, .* or give batches for which the model",
    ),
    (
        lambda: wanda(Net(another_by_values), calibration=batches(8)),
        ValueError,
        "calls 'layers.1', and another block or none in its place if its blocks return slightly other values: which",
    ),
    (
        lambda: wanda(Net(fewer_by_values), calibration=batches(8)),
        ValueError,
        "calls the blocks of 'layers' 1 times, and 2 times if its blocks return slightly other values: which blocks",
    ),
    (
        lambda: wanda(Net(with_a_number), calibration=batches(8)),
        ValueError,
        "What 'layers.1' receives beside the hidden states depends on what earlier blocks computed, .* Prune by a",
    ),
    (
        lambda: wanda(Net(in_order, Remembering), calibration=batches(8)),
        ValueError,
        "Called alone, 'layers.1' returns something else than within the model: it depends on more than its arg",
    ),
    (
        lambda: wanda(Net(in_objects, Wrapping), calibration=batches(8)),
        ValueError,
        "'layers.0' returns states within an object that is no tuple, list, dict or dataclass, .* Return one of these",
    ),
    (
        lambda: wanda(sharing_across_stacks(), calibration=batches(8)),
        ValueError,
        r"weight of 'first.layers.0.fc' is also used by block 'second.layers.0', .* `exclude_modules`",
    ),
    (
        lambda: wanda(Net(reaching_in), calibration=batches(8)),
        ValueError,
        "multiplies 'layers.0.fc' with 128 entries of inputs, and calls of its block with 64: the model also uses",
    ),
    (
        a_mask_of_other_tokens,
        ValueError,
        r"'attention_mask' of shape \(1, 9\) marks padding, but fits the tokens of no stack .* `token_mask` of shape",
    ),
    (
        lambda: wanda(Net(in_order, Pairing), calibration=padded(8)),
        ValueError,
        "'layers.0.fc' gets 4 rows of which it is not known which are padding. Give batches without padding, such as",
    ),
    (
        lambda: wanda(Net(in_order, Pairing), calibration=padded(7, 8)),
        ValueError,
        "'layers.0.fc' gets 4 rows of which it is not known which are padding. .* or add 'layers.0.fc' to",
    ),
    (
        lambda: wanda(Net(in_order, Mixture), calibration=padded(8)),
        ValueError,
        r"'layers.0.experts.\d' gets 8 rows of which it is not known which are padding. Give batches without padding",
    ),
    (
        lambda: wanda(Net(in_order, PairingMixture), calibration=padded(7, 8)),
        ValueError,
        r"'layers.0.mixture.experts.\d' gets 4 rows of which it is not known which are padding. Give batches",
    ),
    (
        no_token_counts,
        ValueError,
        "No calibration batch runs the blocks of 'model.layers', or only on tokens that a mask leaves out. Give",
    ),
    (
        lambda: wanda(tiny("mixtral"), calibration=TOKENS[:1, :1], on_unreached="error"),
        ValueError,
        r"No calibration token reaches \d+ weights of experts, the first of them .* or `on_unreached=\"magnitude\"`",
    ),
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_the_refusal_says_what_to_do(refused, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        refused()
