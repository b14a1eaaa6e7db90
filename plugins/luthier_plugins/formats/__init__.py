"""The data formats that come with Luthier."""

from luthier.api import Component, hookimpl

FORMATS = {
    "messages": ("Conversations: {messages: [{role, content}, ...]}, the assistant's turn last", "messages:Messages"),
    "sharegpt": ("Conversations: {conversations: [{from: human, value}, {from: gpt, value}]}", "sharegpt:ShareGpt"),
    "alpaca": ("Instructions: {instruction, input, output}, and a system prompt or a history", "alpaca:Alpaca"),
    "prompt_completion": (
        "Questions and answers: {prompt, completion}, as texts or lists of messages; the completion is trained",
        "completion:PromptCompletion",
    ),
    "preference": ("Pairs: {prompt, chosen, rejected}, as texts or lists of messages", "preference:Preference"),
    "labelled": ("Good and bad answers: {prompt, completion, label}, the label true or false", "labelled:Labelled"),
    "unpaired": ("Pairs {prompt, chosen, rejected}, each as a good and a bad answer", "labelled:Unpaired"),
    "prompt": ("Prompts without an answer: {prompt}, as a text or a list of messages", "prompt:Prompt"),
    "text": ("Plain text: {text}, for pre-training", "text:Text"),
}  # fmt: skip


@hookimpl
def luthier_components() -> list[Component]:
    here = "luthier_plugins.formats"
    return [
        Component(
            kind="format",
            name=name,
            summary=summary,
            config=f"{here}.config:{impl.partition(':')[2]}Config",
            impl=f"{here}.{impl}",
        )
        for name, (summary, impl) in FORMATS.items()
    ]
