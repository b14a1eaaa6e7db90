"""One plugin of every kind that a third party might write; each part is one small file."""

import os

from luthier.api import Component, hookimpl

PARTS = (
    ("format", "dialogs", "Several dialogs in one row", "DialogsConfig", "dialogs:Dialogs"),
    ("format", "thumbs", "Answers with a thumb up or down", "ThumbsConfig", "thumbs:Thumbs"),
    ("objective", "approval", "Good and bad answers, without pairs", "ApprovalConfig", "approval:Approval"),
    ("objective", "focal", "Unlikely tokens count more", "FocalConfig", "focal:Focal"),
    ("metric", "drift", "How far the model went from another one", "DriftConfig", "drift:Drift"),
    ("metric", "judged", "What a judge thinks of the answers", "JudgedConfig", "judged:Judged"),
    ("tracker", "sqlite", "Metrics, config and outcome in a database", "SqliteConfig", "sqlite:Sqlite"),
    ("regularizer", "confidence", "Too sure answers cost something", "ConfidenceConfig", "confidence:Confidence"),
    ("optimizer", "momentum", "SGD with momentum", "MomentumConfig", "momentum:Momentum"),
    ("augmenter", "asked", "New answers to old questions", "AskedConfig", "asked:Asked"),
    ("executor", "nice", "Workers that stand back, on two slots", "NiceConfig", "nice:Nice"),
)


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind=kind,
            name=name,
            summary=summary,
            config=f"luthier_thirdparty.config:{config}",
            impl=f"luthier_thirdparty.{impl}",
            # A test raises it without editing the package.
            revision=2 if os.environ.get("THIRDPARTY_RAISED") == name else 1,
        )
        for kind, name, summary, config, impl in PARTS
    ]
