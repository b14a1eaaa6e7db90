"""What training minimises: one small file each."""

from luthier.api import Component, hookimpl


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="objective",
            name="cross_entropy",
            summary="The negative log-likelihood of every trained token",
            config="luthier_plugins.objectives.config:CrossEntropyConfig",
            impl="luthier_plugins.objectives.cross_entropy:CrossEntropy",
        ),
        Component(
            kind="objective",
            name="dpo",
            summary="Preference optimization against the reference: DPO, IPO, hinge, EXO, NCA, APO, SPPO, ...",
            config="luthier_plugins.objectives.config:DpoConfig",
            impl="luthier_plugins.objectives.dpo:Dpo",
        ),
        Component(
            kind="objective",
            name="orpo",
            summary="The ORPO loss: fine-tuning on the chosen answer, and the odds ratio",
            config="luthier_plugins.objectives.config:OrpoConfig",
            impl="luthier_plugins.objectives.orpo:Orpo",
        ),
        Component(
            kind="objective",
            name="simpo",
            summary="The SimPO loss: mean log-probabilities with a margin, without a reference",
            config="luthier_plugins.objectives.config:SimpoConfig",
            impl="luthier_plugins.objectives.simpo:Simpo",
        ),
        Component(
            kind="objective",
            name="cpo",
            summary="The CPO loss: log-probabilities and the chosen answers' own loss, without a reference",
            config="luthier_plugins.objectives.config:CpoConfig",
            impl="luthier_plugins.objectives.cpo:Cpo",
        ),
        Component(
            kind="objective",
            name="kto",
            summary="Good and bad answers, unpaired, against the reference: KTO, and APO-zero",
            config="luthier_plugins.objectives.config:KtoConfig",
            impl="luthier_plugins.objectives.kto:Kto",
        ),
    ]
