"""Lets the dense model write the text on which it is calibrated."""

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig

from ..model.blocks import base_model, is_encoder_decoder, prunable_weights
from ..model.kinds import count_zeros, is_quantised
from ..model.offload import execution_device
from ..model.weights import DENSE
from .chat import check_messages, tokens_of
from .inputs import evaluation_mode
from .sources import Entry, entry_of
from .text import SEQUENCE_LENGTH
from .windows import Packer, Window, joined


def generate_sequences(
    model: nn.Module,
    tokenizer: Any,
    count: int = 128,
    length: int = SEQUENCE_LENGTH,
    seed: int = 0,
    *,
    prompts: Iterable[Any] | None = None,
    temperature: float = 1.0,
    batch_size: int = 8,
    assistant_only: bool = False,
    **options: Any,
) -> Tensor | list[dict[str, Tensor]]:
    """Return text of the dense model itself for calibration, sampled by `model.generate`.

    No other text is needed. Williams et al. (2025, arXiv:2410.17170) calibrate on text that the model writes from
    nothing, with a temperature.

    From nothing, or from prompts that are texts, each sequence is one text of `length` tokens. A mark of the end of
    a text is a token as any other, after which the model goes on with another text. From conversations, the model
    gives one answer to each, and stops where it ends it, or after `length` tokens. These conversations follow each
    other until a sequence is full, so there is no padding, and the tokens of the chat template do not count.

    Args:
        model: a dense causal language model that can generate. Adapters take part.
        tokenizer: a tokenizer of transformers. Conversations need a fast one with a chat template.
        count: number of sequences.
        length: length of a sequence, in tokens.
        seed: seed of the random choices. The states of torch's random generators are as before after the call.
        prompts: texts that the model continues, or conversations that it answers; or a `datasets.Dataset` or
            `IterableDataset` with a column "text", "messages" or "conversations". They are used in order, and again
            from the first one on if more are needed. Messages of the assistant at the end of a conversation are left
            out. By default a text begins with the tokenizer's token of a beginning, or with a random token if the
            tokenizer does not write one before each text.
        temperature: the temperature of sampling. 1 samples from the model's own distribution.
        batch_size: how many texts are generated together. The texts depend on it.
        assistant_only: whether of conversations only what the assistant says counts. By default the contents of all
            messages count.
        options: other options of `GenerationConfig`, such as `top_p=0.9`.

    Returns:
        Token ids (count, length); from conversations a list of dicts, one for each sequence, with `input_ids`,
        `labels` and `token_mask` (length,), as `sample_sequences` returns it.

    Raises:
        TypeError: a prompt is neither a text nor a conversation; an option is one that the other arguments decide.
        ValueError: the model is pruned, or cannot generate; there are no prompts, they are of several kinds, or one
            of them has `length` tokens or more; a message has another form, or the template changes its content;
            `GenerationConfig` has no such option.
    """
    writer = _Writer(model, tokenizer, length, batch_size, {"temperature": temperature} | options)
    _check_dense(model)
    # Sampling draws from the generators of all devices of the model.
    devices = range(torch.cuda.device_count())
    with torch.no_grad(), evaluation_mode(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        entries = None if prompts is None else _without_end(prompts)
        first = None if entries is None else next(entries)
        if first is not None and first.kind == "conversation":
            windows = writer.answers(itertools.chain([first], entries or ()), count, assistant_only)
        else:
            starts = writer.nothing() if first is None else writer.texts(itertools.chain([first], entries or ()))
            windows = writer.texts_from(starts, count)
        bar = tqdm(windows, desc="generating", unit="sequence", total=count, leave=False, disable=None)
        return joined(list(itertools.islice(bar, count)))


def _check_dense(model: nn.Module) -> None:
    """Raise ValueError if the model is pruned. Of quantised weights, zeros are rounded values and say nothing."""
    weights = {
        name: weight
        for name, weight in prunable_weights(model).items()
        if (stored := weight.layer._parameters.get(weight.parameter)) is None
        or (stored.is_floating_point() and not is_quantised(stored))
    }
    zeros, entries = count_zeros(weights)
    if zeros > DENSE * entries:
        raise ValueError(
            f"Expected the dense model, and {zeros / entries:.1%} of the weights of this model are zero. What "
            "a pruned model writes is not the text of the dense one. Generate before pruning, or load the dense model."
        )


def _without_end(prompts: Iterable[Any]) -> Iterator[Entry]:
    """Yield the prompts again and again, all of one kind.

    Raises:
        ValueError: there are none, or they are of several kinds.
    """
    kind = None
    for prompt in itertools.cycle([prompts] if isinstance(prompts, (str, Mapping)) else prompts):
        entry = entry_of(prompt)
        kind = kind or entry.kind
        if entry.kind != kind or kind == "tokens":
            raise ValueError(
                f"Expected all prompts as texts, or all as conversations, got a {kind} and a {entry.kind}. Call "
                "`generate_sequences` once for each kind, without token ids."
            )
        yield entry
    raise ValueError("Expected at least one prompt, got none. Leave out `prompts` to generate from nothing.")


class _Writer:
    """Writes text with one model.

    Args:
        model, tokenizer, length, batch_size: the arguments of `generate_sequences`.
        options: options of `GenerationConfig`.

    Raises:
        TypeError: an option is one that the other arguments decide.
        ValueError: the model cannot generate text from text; `GenerationConfig` has no such option.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, length: int, batch_size: int, options: dict[str, Any]
    ) -> None:
        inner: Any = base_model(model)
        if is_encoder_decoder(model) or not (hasattr(inner, "can_generate") and inner.can_generate()):
            raise ValueError(
                f"Expected a causal language model that can generate, got {type(inner).__name__}. Load it by "
                "`AutoModelForCausalLM`, or calibrate on text with `sample_sequences`."
            )
        self.model, self.tokenizer, self.length, self.batch_size = model, tokenizer, length, batch_size
        end = inner.generation_config.eos_token_id
        end = tokenizer.eos_token_id if end is None else end
        self.ends: list[int] = [] if end is None else end if isinstance(end, list) else [end]
        self.device = execution_device(model)
        # What fills up is masked. It must only be a token that the model knows.
        pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if unknown := options.keys() - vars(GenerationConfig()).keys():
            raise ValueError(
                f"Expected options of `GenerationConfig`, got {', '.join(map(repr, sorted(unknown)))}. Its options "
                "are listed in the documentation of Transformers; an example is `top_p=0.9`."
            )
        # Otherwise the defaults of the model's `generation_config` would narrow its distribution.
        options = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0} | options
        # Apart from the others, so that an option of the same name is an error.
        self.config = GenerationConfig(
            do_sample=True, max_new_tokens=length, eos_token_id=self.ends, pad_token_id=pad, **options
        )

    def nothing(self) -> Iterator[list[int]]:
        """Yield beginnings of texts without end: the token that the tokenizer begins with, or a random one."""
        begin = self.tokenizer.bos_token_id
        written = self.tokenizer("a", verbose=False)["input_ids"][:1]
        special = set(self.tokenizer.all_special_ids)
        ordinary = [token for token in range(len(self.tokenizer)) if token not in special]
        while True:
            yield written if written == [begin] else [ordinary[int(torch.randint(len(ordinary), ()))]]

    def texts(self, prompts: Iterable[Entry]) -> Iterator[list[int]]:
        """Yield the tokens of prompts that are texts.

        Raises:
            ValueError: a prompt leaves no room.
        """
        for prompt in prompts:
            tokens = self.tokenizer(prompt.value, verbose=False)["input_ids"]
            if not 0 < len(tokens) < self.length:
                raise ValueError(
                    f"Expected prompts of 1 to {self.length - 1} tokens, because sequences have {self.length}, got "
                    f"one of {len(tokens)}. Give the beginnings of the texts, or raise `length`."
                )
            yield tokens

    def texts_from(self, starts: Iterator[list[int]], count: int) -> Iterator[Window]:
        """Yield texts that go on from `starts`."""
        for done in range(0, count, self.batch_size):
            batch = list(itertools.islice(starts, min(self.batch_size, count - done)))
            missing = self.length - min(map(len, batch))
            # An empty list says that no token ends a text. None would stand for the model's default.
            written = self._generate(batch, missing, ends=[])
            for start, tokens in zip(batch, written, strict=True):
                yield Window((start + tokens)[: self.length])

    def answers(self, prompts: Iterator[Entry], count: int, assistant_only: bool) -> Iterator[Window]:
        """Yield sequences of conversations, each with an answer of the model, without end."""
        packer = Packer(self.length, count)
        while True:
            batch = itertools.islice(prompts, self.batch_size)
            asked = [tokens_of(_question(entry), self.tokenizer, assistant_only, answer=True) for entry in batch]
            answers = self._generate([tokens for tokens, _ in asked], self.length, self.ends)
            for (tokens, counted), answer in zip(asked, answers, strict=True):
                stop = next((place for place, token in enumerate(answer) if token in self.ends), len(answer))
                # The mark of the end belongs to the template.
                ended = answer[: stop + 1]
                window = packer.add(tokens + ended, counted + [place < stop for place in range(len(ended))])
                if window is not None:
                    yield window

    def _generate(self, starts: list[list[int]], tokens: int, ends: list[int]) -> list[list[int]]:
        """Return the tokens that the model writes after each of `starts`."""
        config = copy.copy(self.config)
        config.max_new_tokens, config.eos_token_id = tokens, ends
        longest = max(map(len, starts))
        ids = torch.full((len(starts), longest), config.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, start in enumerate(starts):
            ids[row, longest - len(start) :] = torch.tensor(start)
            mask[row, longest - len(start) :] = 1
        model: Any = self.model
        written = model.generate(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), generation_config=config
        )
        return written[:, longest:].tolist()


def _question(entry: Entry) -> list[dict[str, Any]]:
    """Return the messages of a conversation up to the last one that is not of the assistant."""
    check_messages(entry.value)
    messages = list(entry.value)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages
