"""The configs of the data formats."""

from __future__ import annotations

from luthier.api import Config


class MessagesConfig(Config):
    """Where conversations are in a raw row."""

    field: str = "messages"
    """The key that holds the list of messages."""


class ShareGptConfig(Config):
    """Where conversations are in a raw row."""

    field: str = "conversations"
    """The key that holds the list of turns; a system prompt may stand beside it, under ``system``."""


class AlpacaConfig(Config):
    """Where the parts of an instruction are in a raw row."""

    instruction: str = "instruction"
    """The key of what is to be done."""
    input: str = "input"
    """The key of what it is to be done with: it follows the instruction, after an empty line."""
    output: str = "output"
    """The key of the answer."""
    system: str = "system"
    """The key of a system prompt, which a row may have."""
    history: str = "history"
    """The key of earlier turns, pairs of a question and an answer, which a row may have; they are read, not trained."""


class PromptCompletionConfig(Config):
    """Where a question and its answer are in a raw row."""

    prompt: str = "prompt"
    """The key of the prompt: a text, or a list of messages that ends with the user's."""
    completion: str = "completion"
    """The key of the answer: a text, or a list of messages."""
    system: str = "system"
    """The key of a system prompt, which a row may have."""


class PreferenceConfig(Config):
    """Where the parts of a preference pair are in a raw row."""

    prompt: str = "prompt"
    """The key of the prompt: a text, or a list of messages that ends with the user's. A row may lack it where its two
    answers are conversations: the messages that they begin with alike are the prompt then."""
    chosen: str = "chosen"
    """The key of the better answer: a text, a list with one assistant message, or the whole conversation."""
    rejected: str = "rejected"
    """The key of the worse answer."""


class LabelledConfig(Config):
    """Where the parts of a labelled answer are in a raw row."""

    prompt: str = "prompt"
    """The key of the prompt: a text, or a list of messages that ends with the user's."""
    completion: str = "completion"
    """The key of the answer: a text, or a list with one assistant message."""
    label: str = "label"
    """The key that says whether it is a good one: true or false, or 1 or 0."""


class UnpairedConfig(PreferenceConfig):
    """Where the parts of a preference pair are in a raw row; never chosen unless a recipe names it."""


class PromptConfig(Config):
    """Where the prompt is in a raw row."""

    prompt: str = "prompt"
    """The key of the prompt: a text, or a list of messages that ends with the user's."""


class TextConfig(Config):
    """Where the text is in a raw row."""

    field: str = "text"
    """The key that holds the text."""
