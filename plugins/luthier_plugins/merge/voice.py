"""How the merged model is talked to: chat template and generation config."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

from luthier.api import DataError, Message, ModelError, StageContext
from luthier.artifacts.models import GENERATION, TEMPLATE, chat_template, read_json, stop_token_ids
from luthier_plugins.merge.layout import Inputs

TOKENIZER_CONFIG = "tokenizer_config.json"
SAMPLE: list[Message] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}]


def carry_voice(inputs: Inputs, context: StageContext) -> None:
    """Where the lead was never taught to talk, as a raw base, take how to from the first model that was.

    A template without the stop tokens that go with it would be a model that never stops: both come from there.
    """
    lead, *others = inputs.all
    speaker = next((model for model in inputs.all if chat_template(model.artifact.path) is not None), lead)
    if speaker is lead:
        return
    template = chat_template(speaker.artifact.path)
    assert template is not None, "it was chosen for it"
    (context.out / TEMPLATE).write_text(template, encoding="utf-8")
    settings = speaker.artifact.path / GENERATION
    if settings.exists():
        shutil.copyfile(settings, context.out / GENERATION)
    context.log(f"{lead.label} has no chat template: it and the generation config are those of {speaker.label}")
    other = [model.label for model in others if chat_template(model.artifact.path) not in (None, template)]
    if other:
        context.warn(f"the chat template of {speaker.label} was taken; {', '.join(other)} have another")


def template_of(choice: str, inputs: Inputs) -> str | None:
    """The text of a chat template.

    Args:
        choice: The text itself; the name of one that mergekit has; or ``auto``: the one that most models have, of as
            many the first model's.
        inputs: The models.

    Returns:
        The text; None if no model has one.

    Raises:
        ModelError: it is neither.
    """
    if choice == "auto":
        found = [template for model in inputs.all if (template := chat_template(model.artifact.path)) is not None]
        counts = Counter(template.strip() for template in found)
        return max(found, key=lambda template: counts[template.strip()]) if found else None
    if "{" in choice:
        return choice
    known = resources.files("mergekit") / "_data" / "chat_templates"
    names = sorted(file.name.removesuffix(".jinja") for file in known.iterdir() if file.name.endswith(".jinja"))
    if choice not in names:
        raise ModelError(f"`chat_template` is neither Jinja text nor a name: {choice!r}; there are auto, "
                         f"{', '.join(names)}")  # fmt: skip
    return (known / f"{choice}.jinja").read_text(encoding="utf-8")


def give_template(template: str, context: StageContext) -> None:
    """Give the merged model a chat template, and say so if it would never stop talking."""
    (context.out / TEMPLATE).write_text(template, encoding="utf-8")
    settings = context.out / TOKENIZER_CONFIG
    if settings.exists() and "chat_template" in (told := read_json(settings)):
        settings.write_text(json.dumps({key: value for key, value in told.items() if key != "chat_template"},
                                       indent=2, ensure_ascii=False), encoding="utf-8")  # fmt: skip
    problem = _silence(context.out)
    if problem:
        context.warn(f"the chat template does not go with the model: {problem}")


def _silence(folder: Path) -> str | None:
    """Why a conversation cannot be written with a model's template and stop tokens; None if it can."""
    from luthier.train.text import encode_conversation
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    try:
        encode_conversation(tokenizer, SAMPLE, stop_token_ids(folder))
    except DataError as error:
        return str(error)
    return None
