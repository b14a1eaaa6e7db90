"""Chat template, special tokens and generation config of the merged model: of one model, all three."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from luthier.api import Message, ModelError, StageContext
from luthier.artifacts.json_files import read_json, write_json
from luthier.artifacts.texts import (
    GENERATION,
    TOKENIZER_CONFIG,
    chat_template,
    copy_text_files,
    has_tokenizer,
    remove_tokenizer,
    special_tokens,
    stop_token_ids,
    take_chat_templates,
    write_chat_template,
)
from luthier.merging.layout import Inputs
from luthier.merging.reader import Source
from luthier.merging.vocabulary import own_tokens

SPECIAL = ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id")
SAMPLE: list[Message] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}]
Tokens = Mapping[str, int]
"""The id of every token."""


@dataclass(frozen=True, slots=True)
class TemplateChoice:
    """What is not as the lead has it.

    Attributes:
        template: The text of a chat template that is no model's.
        owner: The model whose chat template, special tokens and generation config are taken, all of them together: a
            template without the stop tokens that go with it would be a model that never stops.
        warning: What to warn about.
    """

    template: str | None = None
    owner: Source | None = None
    warning: str | None = None


def template_choice_of(choice: str | None, inputs: Inputs) -> TemplateChoice:
    """The chat template, special tokens and generation config of the merged model.

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
        return TemplateChoice(owner=owner, warning=warning)
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


def write_template_choice(
    choice: TemplateChoice, inputs: Inputs, context: StageContext, tokens: Tokens | None = None
) -> dict[str, Any]:
    """Give the merged model its chat template with what goes with it, and warn of what may be wrong with them.

    Args:
        choice: What is taken.
        inputs: The models.
        context: Where the lead's text files, or those of a new vocabulary, are already.
        tokens: The ids of the tokens of a new vocabulary.

    Returns:
        What ``config.json`` says of special tokens.
    """
    if choice.warning:
        context.warn(choice.warning)
    if choice.template is not None:
        write_chat_template(context.out, choice.template)
        problem = _silence(context.out)
        if problem:
            context.warn(f"the chat template does not go with the model: {problem}")
    owner = choice.owner
    if owner is None or (owner is inputs.lead and tokens is None):
        return {}
    folder = owner.artifact.path
    if owner is not inputs.lead:
        context.log(f"{owner.label} gives the chat template, the special tokens and the generation config")
    (context.out / GENERATION).unlink(missing_ok=True)
    if tokens is None:
        # The same tokens with the same ids: what else a tokenizer says of them goes with the template.
        remove_tokenizer(context.out)
        copy_text_files(folder, context.out)
        return {key: owner.config[key] for key in SPECIAL if key in owner.config}
    take_chat_templates(folder, context.out)
    own = special_tokens(folder)
    _set_special_tokens(context.out, {task: token for task, token in own.items() if token in tokens})
    lost = sorted({token for token in own.values() if token not in tokens})
    if lost:
        context.warn(
            f"{owner.label} gives the chat template, and the merged model's vocabulary lacks its special tokens "
            f"{', '.join(lost)}"
        )
    texts = {place: token for token, place in own_tokens(owner).items()}
    moved = {place: tokens[token] for place, token in texts.items() if token in tokens}
    if (folder / GENERATION).exists():
        write_json(context.out / GENERATION, _translated(read_json(folder / GENERATION), moved))
    return _translated({key: owner.config[key] for key in SPECIAL if key in owner.config}, moved)


def _set_special_tokens(out: Path, tokens: Mapping[str, str]) -> None:
    """Say in a tokenizer's files which tokens have which task."""
    for name in (TOKENIZER_CONFIG, "special_tokens_map.json"):
        if (out / name).exists():
            write_json(out / name, {**read_json(out / name), **tokens})


def _translated(values: dict[str, Any], moved: Mapping[int, int]) -> dict[str, Any]:
    """Settings whose ids of tokens are those of the new vocabulary."""

    def new(ids: Any) -> Any:
        return [moved.get(item, item) for item in ids] if isinstance(ids, list) else moved.get(ids, ids)

    return values | {key: new(values[key]) for key in SPECIAL if values.get(key) is not None}


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
