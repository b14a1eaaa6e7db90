"""The stages that merge models and adapters, make them from each other, and compare them."""

from luthier.api import Component, hookimpl

PACKAGE = "luthier_plugins.merge"
STAGES = (
    ("merge", "Merge models of one architecture, in a stream",
     "luthier.merging.config:MergeConfig", "stage:MergeStage", 2),
    ("merge_adapters", "Merge adapters into one: exact, or in a smaller rank",
     f"{PACKAGE}.adapters.config:MergeAdaptersConfig", "adapters.merge:MergeAdapters", 1),
    ("extract_lora", "The difference between a tuned model and its ancestor as a LoRA adapter",
     f"{PACKAGE}.adapters.config:ExtractLoraConfig", "adapters.extract:ExtractLora", 1),
    ("moe", "A mixture of experts made from dense models", f"{PACKAGE}.moe.config:MoeConfig", "moe.stage:Moe", 2),
    ("search", "Find the weights and parameters of a merge on a validation set",
     f"{PACKAGE}.search.config:SearchConfig", "search.stage:Search", 2),
    ("diff", "Compare models parameter by parameter", f"{PACKAGE}.diff.config:DiffConfig", "diff.stage:Diff", 1),
)  # fmt: skip
"""Name, summary, config class, the module and class that do the work, and the revision of each."""


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="stage",
            name=name,
            summary=summary,
            config=config,
            impl=f"{PACKAGE}.{impl}",
            revision=revision,
        )
        for name, summary, config, impl, revision in STAGES
    ]
