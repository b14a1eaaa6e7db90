"""The ``Modelfile`` for Ollama: which file, the prompt's format as a Go template, where to stop."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.api import DataError, Facts, Message
from luthier.modeling.text import render

CONTEXT = 4096
"""Ollama reserves memory for the whole context: a model made for very long ones gets this much unless asked."""
SPOKEN: tuple[tuple[Message, ...], ...] = (
    (Message(role="user", content="Hello"),),
    (
        Message(role="system", content="Be kind."),
        Message(role="user", content="One?"),
        Message(role="assistant", content="Two."),
        Message(role="user", content="Three?"),
    ),
)


@dataclass(frozen=True, slots=True)
class Format:
    """A format of prompts that is common: as a Go template, and what that template gives.

    Attributes:
        name: What it is called.
        go: The template, in Go's language with Ollama's variables.
        gives: The prompt of a conversation, open for the assistant.
    """

    name: str
    go: str
    gives: Callable[[Sequence[Message]], str]


def _turns(before: str, after: str, opened: str, names: Mapping[str, str]) -> Callable[[Sequence[Message]], str]:
    def gives(messages: Sequence[Message]) -> str:
        turns = [before.format(names.get(item["role"], item["role"])) + item["content"] + after for item in messages]
        return "".join(turns) + opened

    return gives


FORMATS = (
    Format(
        "ChatML",
        '{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n',
        _turns("<|im_start|>{}\n", "<|im_end|>\n", "<|im_start|>assistant\n", {}),
    ),
    Format(
        "Llama 3",
        "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        _turns("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>",
               "<|start_header_id|>assistant<|end_header_id|>\n\n", {}),
    ),
    Format(
        "Gemma",
        '{{- range .Messages }}<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}{{ .Role }}{{ end }}\n'
        "{{ .Content }}<end_of_turn>\n{{ end }}<start_of_turn>model\n",
        _turns("<start_of_turn>{}\n", "<end_of_turn>\n", "<start_of_turn>model\n", {"assistant": "model"}),
    ),
    Format(
        "Phi-3",
        "{{- range .Messages }}<|{{ .Role }}|>\n{{ .Content }}<|end|>\n{{ end }}<|assistant|>\n",
        _turns("<|{}|>\n", "<|end|>\n", "<|assistant|>\n", {}),
    ),
)  # fmt: skip
"""Formats whose Go templates are known; whether a model has one of them is tried, not guessed from names."""


def format_of(tokenizer: Any) -> Format | None:
    """The format that gives the very prompts that the model's own template gives, the first token aside."""
    if tokenizer.chat_template is None:
        return None
    for known in FORMATS:
        if all(_same(tokenizer, known, messages) for messages in _understood(tokenizer)):
            return known
    return None


def _understood(tokenizer: Any) -> list[tuple[Message, ...]]:
    """The conversations that the model's template takes: some refuse a system message."""
    found: list[tuple[Message, ...]] = []
    for messages in (*SPOKEN, SPOKEN[1][1:]):
        try:
            render(tokenizer, messages, open_turn=True)
        except DataError:
            continue
        found.append(messages)
    return found


def _same(tokenizer: Any, known: Format, messages: Sequence[Message]) -> bool:
    prompt = render(tokenizer, messages, open_turn=True)
    return prompt.removeprefix(tokenizer.bos_token or "") == known.gives(messages)


def _lead(tokenizer: Any) -> str:
    """The first token as text, where the model's template writes it and the tokenizer, and so the file, does not."""
    text, prompt = tokenizer.bos_token or "", render(tokenizer, SPOKEN[0], open_turn=True)
    adds = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return text if text and prompt.startswith(text) and not adds else ""


def write_modelfile(
    folder: Path, files: Mapping[str, Facts], tokenizer: Any, facts: Facts, context_length: int
) -> None:
    """Write ``Modelfile`` for the last of the files."""
    known = format_of(tokenizer)
    lines = ["# ollama create NAME -f Modelfile", f"FROM ./{list(files.values())[-1]['file']}"]
    if known is not None:
        lines += [f"# {known.name}", f'TEMPLATE """{_lead(tokenizer)}{known.go}"""']
    else:
        lines.append("# The chat template inside of the GGUF file is used: it is none of the common ones.")
    lines += [f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}" for token in facts.get("stop_tokens", [])]
    lines.append(f"PARAMETER num_ctx {min(context_length, CONTEXT)}")
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
