"""Augmenters beside templates: those that ask a generator, those that edit texts, and filters."""

from luthier.api import Component, hookimpl

_SUMMARIES = {
    "answer": ("Answer", "Have a generator answer the rows' prompts: all answers, the best, or pairs to prefer from"),
    "paraphrase": ("Paraphrase", "Have a generator say what users say in other words"),
    "back_translate": ("BackTranslate", "Say what users say in other words, by way of another language"),
    "synthesize": ("Synthesize", "Have a generator write new rows like those there are"),
    "edits": ("Edits", "Write what users say as people type: typos, casing, missing punctuation"),
    "filter": ("Filter", "Keep the rows that a rule, a judge or a reward finds good"),
}
_MODULES = {"paraphrase": "rewriting", "back_translate": "rewriting"}


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="augmenter",
            name=name,
            summary=summary,
            config=f"luthier_plugins.augmenters.config:{impl}Config",
            impl=f"luthier_plugins.augmenters.{_MODULES.get(name, name)}:{impl}",
        )
        for name, (impl, summary) in _SUMMARIES.items()
    ]
