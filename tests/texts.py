"""What tests of text share: tokenizers made on the spot, with a chat template."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from conftest import tiny


# Adds a system prompt of its own if there is none, as those of SmolLM2 and Qwen 2.5 do.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<S>BE KIND</S>{% endif %}"
    "{% for message in messages %}<{{ message['role'] | upper }}>{{ message['content'] }}</S>{% endfor %}"
    "{% if add_generation_prompt %}<ASSISTANT>{% endif %}"
)


def byte_tokenizer():
    """A byte-level BPE like that of GPT-2 and Llama 3, which begins every text with a special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a line\n\n\n\n another line\n\n\n and a third\n\n"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", model_max_length=8, chat_template=CHAT_TEMPLATE
    )


def character_tokenizer(template=CHAT_TEMPLATE, **options):
    """Each of the 60 characters from the space to the bracket is a token, as many as the tiny models know."""
    characters = {chr(code): code - 32 for code in range(32, 92)} | {"[END]": 60}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", eos_token="[END]", chat_template=template, **options
    )


def says(role, content):
    return {"role": role, "content": content}


def conversation(question, answer):
    return [says("user", question), says("assistant", answer)]


def save_tiny_model(folder):
    """Save a tiny Llama with a tokenizer of single characters, and return the folder."""
    character_tokenizer().save_pretrained(folder)
    tiny("llama").save_pretrained(folder)
    return folder


def write_text(path):
    """Write a text that fills some dozens of short sequences, and return the path."""
    path.write_text("\n\n".join(f"THE {i} OF {i * i} IS NOT {i + 7}, AND THAT IS THAT." * 3 for i in range(80)))
    return path
