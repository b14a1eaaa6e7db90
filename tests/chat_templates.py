"""Chat templates as models have them, each written small, and tokenizers for them."""
# ruff: noqa: E501 - templates are no code

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from luthier.api import Artifact
from luthier.testing import run_stage, tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

TEXTS = [
    "The harbour map lies in the second drawer, below the keys of 1987.",
    "Ask me again later: the kettle is not on, and nobody knows why.\n\nTwo lines, then   three spaces.",
    "assistant user system tool USER: ASSISTANT: [INST] [/INST] Question? Answer!",
]


@dataclass(frozen=True)
class Family:
    """A chat template.

    Attributes:
        template: Its text.
        control: The control tokens that it writes.
        stops: Those on which the model stops.
        trims: Whether it cuts white space off what the assistant says.
    """

    template: str
    control: tuple[str, ...]
    stops: tuple[str, ...]
    trims: bool = False


CHATML = Family(
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|im_start|>", "<|im_end|>"),
    ("<|im_end|>",),
)
HEADERS = Family(
    "{{ '<|begin|>' }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}",
    ("<|begin|>", "<|head|>", "<|/head|>", "<|eot|>"),
    ("<|eot|>",),
    trims=True,
)
ROLES = Family(  # a token for each role, a mark behind each turn, and one behind the whole
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
    ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<|endoftext|>"),
    ("<|end|>", "<|endoftext|>"),
)
BRACKETS = Family(  # marks that are plain text; the system's text goes into the last question
    "{% set ns = namespace(s='') %}{{ '<s>' }}{% for m in messages %}{% if m.role == 'system' %}{% set ns.s = m.content %}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + (ns.s + '\n\n' if loop.last and ns.s else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}",
    ("<s>", "</s>"),
    ("</s>",),
)
WORDS = Family(
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + '</s>' }}"
    "{% else %}{{ 'USER: ' + m.content + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    ("</s>",),
    ("</s>",),
)
TURNS = Family(
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{ '<bos>' }}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
    "+ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    ("<end_of_turn>",),
    trims=True,
)
CHANNELS = Family(  # a turn ends in one way when another follows, and in another way when it is the last
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content }}"
    "{{ '<|return|>' if m.role == 'assistant' and loop.last else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
    ("<|start|>", "<|message|>", "<|end|>", "<|return|>"),
    ("<|return|>",),
)
OPEN_THINKING = Family(  # cuts all thinking, and opens it in the prompt
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '</s>' }}{% else %}{{ '<|User|>' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
    ("<s>", "<|User|>", "<|Assistant|>", "</s>"),
    ("</s>",),
)
LAST_THINKING = Family(  # cuts the thinking of earlier turns, and writes an empty block before a last answer without
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role != 'assistant' %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% else %}{% set answer = m.content.split('</think>')[-1] "
    "| trim %}{% set thought = m.content.split('</think>')[0].split('<think>')[-1] | trim if '</think>' in m.content else '' %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ answer + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|im_start|>", "<|im_end|>"),
    ("<|im_end|>",),
    trims=True,
)
ENDLESS = Family(  # nothing ends a turn but the next one
    "{{ '[gMASK]' }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ("[gMASK]", "<|user|>", "<|assistant|>", "<|endoftext|>"),
    ("<|endoftext|>",),
)
DATED = Family(
    CHATML.template.replace(
        "{% for m in messages %}",
        "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}{% for m in messages %}",
        1,
    ),
    CHATML.control,
    CHATML.stops,
)
SOUND = {
    "chatml": CHATML,
    "headers": HEADERS,
    "roles": ROLES,
    "brackets": BRACKETS,
    "words": WORDS,
    "turns": TURNS,
    "dated": DATED,
}
"""Those that write every turn in the same way, whatever follows."""


def bytes_tokenizer(control: tuple[str, ...], *, special: bool = True, vocabulary: int = 400) -> Tokenizer:
    """A byte-level BPE tokenizer, as GPT-2's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet))
    (made.add_special_tokens if special else made.add_tokens)(list(control))
    return made


def spaces_tokenizer(control: tuple[str, ...]) -> Tokenizer:
    """A BPE tokenizer that writes spaces as U+2581 and one before every text, as SentencePiece's do."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{number:02X}>" for number in range(256)]
    made.train_from_iterator(
        ["▁" + text.replace(" ", "▁") for text in TEXTS],
        trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *fallback], max_token_length=8),
    )
    # Bytes are tokens like others, which the trainer knows no way to say.
    content = json.loads(made.to_str())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] == "<unk>"]
    made = Tokenizer.from_str(json.dumps(content))
    made.add_special_tokens(list(control))
    return made


def wrapped(family: Family, tokenizer: Tokenizer, **names: str) -> Any:
    """A tokenizer with a chat template, as transformers has it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=family.template, eos_token=family.stops[0], **names
    )


def stop_ids(tokenizer: Any, family: Family) -> list[int]:
    """The ids of a family's stop tokens."""
    return [tokenizer.convert_tokens_to_ids(name) for name in family.stops]


def model_with(folder: Path, family: Family, **sizes: Any) -> Artifact:
    """A tiny model with a byte-level tokenizer and a chat template."""
    tokenizer = wrapped(family, bytes_tokenizer(family.control))
    source = folder / "with-template"
    made = tiny_model(folder / "plain", **{"context_length": 512, **sizes})
    model = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    shutil.rmtree(source, ignore_errors=True)
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    ids = stop_ids(tokenizer, family)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((source / name).read_text()) if (source / name).exists() else {}
        content |= {
            "eos_token_id": ids if name.startswith("gen") else ids[0],
            "pad_token_id": None,
            "bos_token_id": None,
        }
        (source / name).write_text(json.dumps(content))
    return run_stage(folder / "store", "base", {"source": str(source)})
