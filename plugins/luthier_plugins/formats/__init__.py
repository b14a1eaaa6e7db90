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
            name="labelled",
            summary="Good and bad answers: {prompt, completion, label}, the label true or false",
            config="luthier_plugins.formats.config:LabelledConfig",
            impl="luthier_plugins.formats.labelled:Labelled",
        ),
        Component(
            kind="format",
            name="unpaired",
            summary="Pairs {prompt, chosen, rejected}, each as a good and a bad answer",
            config="luthier_plugins.formats.config:UnpairedConfig",
            impl="luthier_plugins.formats.labelled:Unpaired",
        ),
        Component(
            kind="format",
            name="text",
            summary="Plain text: {text}, for pre-training",
            config="luthier_plugins.formats.config:TextConfig",
            impl="luthier_plugins.formats.text:Text",
        ),
    ]
