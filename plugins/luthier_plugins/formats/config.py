"""The configs of the data formats."""

from __future__ import annotations

from luthier.api import Config


class MessagesConfig(Config):
    """Where conversations are in a raw row."""

    field: str = "messages"
    """The key that holds the list of messages."""


class PreferenceConfig(Config):
    """Where the parts of a preference pair are in a raw row."""

    prompt: str = "prompt"
    """The key of the prompt: a text, or a list of messages that ends with the user's."""
    chosen: str = "chosen"
    """The key of the better answer: a text, or a list with one assistant message."""
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


class TextConfig(Config):
    """Where the text is in a raw row."""

    field: str = "text"
    """The key that holds the text."""
