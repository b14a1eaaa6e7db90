"""The data formats that come with Luthier."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="format",
            name="messages",
            summary="Conversations: {messages: [{role, content}, ...]}, the last turn the assistant's",
            config="luthier_plugins.formats.config:MessagesConfig",
            impl="luthier_plugins.formats.messages:Messages",
        ),
        Component(
            kind="format",
            name="preference",
            summary="Pairs: {prompt, chosen, rejected}, as texts or lists of messages",
            config="luthier_plugins.formats.config:PreferenceConfig",
            impl="luthier_plugins.formats.preference:Preference",
        ),
        Component(
            kind="format",
            name="text",
            summary="Plain text: {text}, for pre-training",
            config="luthier_plugins.formats.config:TextConfig",
            impl="luthier_plugins.formats.text:Text",
        ),
    ]
