"""Merge methods: one small file for each, or for a family that shares its formula."""

from luthier.api import Component, hookimpl

PACKAGE = "luthier_plugins.merge_methods"
METHODS = (
    (
        "arcee_fusion",
        "Take over the most important changes of one model",
        "ArceeFusionConfig",
        "arcee_fusion:ArceeFusion",
        1,
    ),
    (
        "breadcrumbs",
        "Add up task vectors without their largest and smallest entries",
        "BreadcrumbsConfig",
        "task_vectors:Breadcrumbs",
        1,
    ),
    (
        "breadcrumbs_ties",
        "Breadcrumbs with the sign election of TIES",
        "BreadcrumbsTiesConfig",
        "task_vectors:BreadcrumbsTies",
        1,
    ),
    ("dare_linear", "Add up task vectors with entries dropped at random", "DareConfig", "task_vectors:DareLinear", 1),
    ("dare_ties", "DARE with the sign election of TIES", "DareTiesConfig", "task_vectors:DareTies", 1),
    ("della", "Drop small entries more likely, elect signs", "DellaConfig", "task_vectors:Della", 1),
    ("della_linear", "Drop small entries more likely, add up", "DellaLinearConfig", "task_vectors:DellaLinear", 1),
    ("fisher", "Average weighted by the Fisher information on data", "FisherConfig", "data_driven:Fisher", 2),
    ("iso_c", "Sum of task matrices with equal singular values", "IsoCConfig", "spectral:IsoC", 1),
    ("karcher", "Mean of any number of models on the sphere", "KarcherConfig", "sphere:Karcher", 1),
    ("linear", "Weighted average of the models (model soup)", "LinearConfig", "linear:Linear", 1),
    (
        "mergekit",
        "Any method that is registered with mergekit, tensor by tensor",
        "MergekitConfig",
        "mergekit:Mergekit",
        1,
    ),
    (
        "model_stock",
        "Toward the models' mean, as far as their task vectors agree in direction",
        "ModelStockConfig",
        "model_stock:ModelStock",
        1,
    ),
    (
        "multislerp",
        "Interpolation of any number of models in a tangent space of the sphere",
        "MultislerpConfig",
        "sphere:Multislerp",
        1,
    ),
    (
        "nearswap",
        "From the base toward one model, by a fixed distance at most",
        "NearswapConfig",
        "nearswap:Nearswap",
        1,
    ),
    ("nuslerp", "Spherical interpolation by weights, of models or task vectors", "NuslerpConfig", "slerp:Nuslerp", 1),
    (
        "passthrough",
        "One model's parameters as they are, for stacks of slices",
        "PassthroughConfig",
        "passthrough:Passthrough",
        1,
    ),
    ("ram", "Average shared changes, take over those of one model alone", "RamConfig", "ram:Ram", 1),
    ("regmean", "Match the models' linear layers on data in least squares", "RegmeanConfig", "data_driven:Regmean", 2),
    ("sce", "Select by variance, weigh by energy, erase minority signs", "SceConfig", "sce:Sce", 1),
    ("slerp", "Spherical interpolation between two models", "SlerpConfig", "slerp:Slerp", 1),
    ("task_arithmetic", "Add up the task vectors", "TaskArithmeticConfig", "task_vectors:TaskArithmetic", 1),
    ("ties", "Trim task vectors, elect signs, average what agrees", "TiesConfig", "task_vectors:Ties", 1),
    ("tsv_m", "Task singular vectors, made orthogonal to each other", "TsvMConfig", "spectral:TsvM", 1),
)
"""Name, summary, config class, the module and class that do the work, and the revision of each."""


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="merge_method",
            name=name,
            summary=summary,
            config=f"{PACKAGE}.config:{config}",
            impl=f"{PACKAGE}.{impl}",
            revision=revision,
        )
        for name, summary, config, impl, revision in METHODS
    ]
