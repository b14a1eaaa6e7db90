"""Merge methods: one small file for each, or for a family that shares its formula."""

from luthier.api import Component, hookimpl

PACKAGE = "luthier_plugins.merge_methods"
METHODS = (
    ("arcee_fusion", "Take over the most important changes of one model", "ArceeFusionConfig", "towards:ArceeFusion"),
    (
        "breadcrumbs",
        "Add up task vectors without their largest and smallest entries",
        "BreadcrumbsConfig",
        "task_vectors:Breadcrumbs",
    ),
    (
        "breadcrumbs_ties",
        "Breadcrumbs with the sign election of TIES",
        "BreadcrumbsTiesConfig",
        "task_vectors:BreadcrumbsTies",
    ),
    ("dare_linear", "Add up task vectors with entries dropped at random", "DareConfig", "task_vectors:DareLinear"),
    ("dare_ties", "DARE with the sign election of TIES", "DareTiesConfig", "task_vectors:DareTies"),
    ("della", "Drop small entries more likely, elect signs", "DellaConfig", "task_vectors:Della"),
    ("della_linear", "Drop small entries more likely, add up", "DellaLinearConfig", "task_vectors:DellaLinear"),
    ("fisher", "Average weighted by the Fisher information on data", "FisherConfig", "data_driven:Fisher"),
    ("iso_c", "Sum of task matrices with equal singular values", "IsoCConfig", "spectral:IsoC"),
    ("karcher", "Mean of any number of models on the sphere", "KarcherConfig", "sphere:Karcher"),
    ("linear", "Weighted average of the models (model soup)", "LinearConfig", "linear:Linear"),
    (
        "mergekit",
        "Any method that is registered with mergekit, tensor by tensor",
        "MergekitConfig",
        "mergekit:Mergekit",
    ),
    (
        "model_stock",
        "Towards the models' mean, as far as their task vectors agree in direction",
        "ModelStockConfig",
        "model_stock:ModelStock",
    ),
    (
        "multislerp",
        "Interpolation of any number of models in a tangent space of the sphere",
        "MultislerpConfig",
        "sphere:Multislerp",
    ),
    ("nearswap", "From the base towards one model, by a fixed distance at most", "NearswapConfig", "towards:Nearswap"),
    ("nuslerp", "Spherical interpolation by weights, of models or task vectors", "NuslerpConfig", "slerp:Nuslerp"),
    (
        "passthrough",
        "One model's parameters as they are, for stacks of slices",
        "PassthroughConfig",
        "passthrough:Passthrough",
    ),
    ("ram", "Average shared changes, take over those of one model alone", "RamConfig", "ram:Ram"),
    ("regmean", "Match the models' linear layers on data in least squares", "RegmeanConfig", "data_driven:Regmean"),
    ("sce", "Select by variance, weigh by energy, erase minority signs", "SceConfig", "sce:Sce"),
    ("slerp", "Spherical interpolation between two models", "SlerpConfig", "slerp:Slerp"),
    ("task_arithmetic", "Add up the task vectors", "TaskArithmeticConfig", "task_vectors:TaskArithmetic"),
    ("ties", "Trim task vectors, elect signs, average what agrees", "TiesConfig", "task_vectors:Ties"),
    ("tsv_m", "Task singular vectors, made orthogonal to each other", "TsvMConfig", "spectral:TsvM"),
)
"""Name, summary, config class, and the module and class that do the work."""


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="merge",
            name=name,
            summary=summary,
            config=f"{PACKAGE}.config:{config}",
            impl=f"{PACKAGE}.{impl}",
            revision=4,
        )
        for name, summary, config, impl in METHODS
    ]
