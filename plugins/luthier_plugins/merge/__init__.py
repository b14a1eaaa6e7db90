"""The stages that merge models and adapters, make them from each other, and compare them."""

from luthier.api import Component, hookimpl

PACKAGE = "luthier_plugins.merge"
STAGES = (
    ("merge", "Merge models of one architecture, in a stream", "config:MergeConfig", "stage:MergeStage", 4),
    ("merge_adapters", "Merge adapters into one: exact, or in a smaller rank",
     "adapters.config:MergeAdaptersConfig", "adapters.merge:MergeAdapters", 3),
    ("extract_lora", "The difference between a tuned model and its ancestor as a LoRA adapter",
     "adapters.config:ExtractLoraConfig", "adapters.extract:ExtractLora", 4),
    ("moe", "A mixture of experts out of dense models", "moe.config:MoeConfig", "moe.stage:Moe", 1),
    ("search", "Find the weights and parameters of a merge on a validation set",
     "search.config:SearchConfig", "search.stage:Search", 2),
    ("diff", "Compare models parameter by parameter", "diff.config:DiffConfig", "diff.stage:Diff", 2),
)  # fmt: skip
"""Name, summary, config class, the module and class that do the work, and their revision."""


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="stage",
            name=name,
            summary=summary,
            config=f"{PACKAGE}.{config}",
            impl=f"{PACKAGE}.{impl}",
            revision=revision,
        )
        for name, summary, config, impl, revision in STAGES
    ]
