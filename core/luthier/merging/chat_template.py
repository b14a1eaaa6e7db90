"""Chat template and generation config of the merged model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from luthier.api import Message, ModelError, StageContext
from luthier.artifacts.models import GENERATION, TEMPLATE, chat_template, has_tokenizer, read_json, stop_token_ids
from luthier.merging.layout import Inputs
from luthier.merging.reader import Source

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL = ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id")
SAMPLE: list[Message] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}]
Moved = Mapping[int, int]
"""The ids of tokens that have another id in the merged model."""


@dataclass(frozen=True, slots=True)
class TemplateChoice:
    """What is not as the lead has it.

    Attributes:
        template: The chat template.
        owner: The model whose generation config goes along: a template without the stop tokens that go with it
            would be a model that never stops.
        warning: What to warn about.
    """

    template: str | None = None
    owner: Source | None = None
    warning: str | None = None


def template_choice_of(choice: str | None, inputs: Inputs) -> TemplateChoice:
    """The chat template and generation config of the merged model.

    Args:
        choice: The text of a template; the name of one that mergekit has; ``auto``: the one that most models have, of
            as many the first model's; None: the lead's, or if it was never taught to talk, as a raw base, that of the
            first model that was.
        inputs: The models.

    Raises:
        ModelError: the choice is neither, or there is no tokenizer that a template could go with.
    """
    found = {model: template for model in inputs.all if (template := chat_template(model.artifact.path)) is not None}
    if choice is None or choice == "auto":
        if not found:
            return TemplateChoice(warning="no model has a chat template" if choice else None)
        counts = Counter(template.strip() for template in found.values())
        owner = max(found, key=lambda model: counts[found[model].strip()]) if choice else next(iter(found))
        if choice is None and inputs.lead in found:
            return TemplateChoice()
        other = [model.label for model, template in found.items() if template.strip() != found[owner].strip()]
        warning = f"the chat template of {owner.label} was taken; {', '.join(other)} have another" if other else None
        return TemplateChoice(found[owner], owner, warning)
    if not has_tokenizer(inputs.lead.artifact.path):
        raise ModelError(f"a chat template needs a tokenizer, and {inputs.lead.label} has none")
    return TemplateChoice(choice if "{" in choice else _named(choice))


def _named(name: str) -> str:
    known = resources.files("mergekit") / "_data" / "chat_templates"
    names = sorted(file.name.removesuffix(".jinja") for file in known.iterdir() if file.name.endswith(".jinja"))
    if name not in names:
        raise ModelError(
            f"`chat_template` is neither Jinja text nor a name: {name!r}; there are auto, {', '.join(names)}"
        )
    return (known / f"{name}.jinja").read_text(encoding="utf-8")


def write_chat_template(
    template_choice: TemplateChoice, inputs: Inputs, context: StageContext, moved: Moved | None = None
) -> None:
    """Give the merged model its chat template and generation config, and warn of what may be wrong with them.

    Args:
        moved: The new ids of the owner's tokens, where they have others.
    """
    if template_choice.warning:
        context.warn(template_choice.warning)
    if template_choice.template is None:
        return
    (context.out / TEMPLATE).write_text(template_choice.template, encoding="utf-8")
    settings = context.out / TOKENIZER_CONFIG
    if settings.exists() and "chat_template" in (content := read_json(settings)):
        _write(settings, {key: value for key, value in content.items() if key != "chat_template"})
    if template_choice.owner is not None:
        generation = template_choice.owner.artifact.path / GENERATION
        if generation.exists() and (moved or template_choice.owner is not inputs.lead):
            content = read_json(generation)
            _write(
                context.out / GENERATION,
                content
                | {key: _translated(content[key], moved or {}) for key in SPECIAL if content.get(key) is not None},
            )
        if template_choice.owner is not inputs.lead:
            context.log(f"{template_choice.owner.label} gives the chat template and the generation config")
        return
    problem = _silence(context.out)
    if problem:
        context.warn(f"the chat template does not go with the model: {problem}")


def _translated(ids: int | list[int], moved: Moved) -> int | list[int]:
    return [moved.get(item, item) for item in ids] if isinstance(ids, list) else moved.get(ids, ids)


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _silence(folder: Path) -> str | None:
    """Why a conversation cannot be written with a model's template and stop tokens; None if it can."""
    from transformers import AutoTokenizer

    from luthier.modeling.chat import ChatEncoder

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ChatEncoder(tokenizer, stop_token_ids(folder)).conversation(SAMPLE)
    # transformers may raise anything; the merged model is complete, whatever its tokenizer is like.
    except Exception as error:  # noqa: BLE001
        return str(error)
    return None
