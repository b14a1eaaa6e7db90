"""Adapters that are no LoRA: VeRA (Kopiczko et al. 2023, arXiv:2310.11454), IA3 (Liu et al. 2022, arXiv:2205.05638),
OFT (Qiu et al. 2023, arXiv:2306.07280), and whatever else PEFT has."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import peft
from luthier.api import Adapter, ModelError
from luthier.modeling.adapter_targets import check_targets, linear_names
from luthier.modeling.fresh_adapters import with_adapter
from luthier_plugins.adapters.config import Ia3Config, OftConfig, PeftTunerConfig, VeraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn


def targets_of(model: Any, wanted: str | list[str]) -> list[str]:
    """The layers that a config names; PEFT knows ``all-linear`` for some of its tuners only.

    Raises:
        ModelError: one of them is none of the model's.
    """
    if isinstance(wanted, str):
        return linear_names(model)
    check_targets(model, wanted)
    return wanted


class Vera(Adapter[VeraConfig]):
    """The adapter ``vera``."""

    def wrap(self, model: Any) -> nn.Module:
        config = peft.VeraConfig(
            r=self.config.r,
            d_initial=self.config.d_initial,
            vera_dropout=self.config.vera_dropout,
            projection_prng_key=self.context.seed,
            target_modules=targets_of(model, self.config.target_modules),
            layers_to_transform=self.config.layers,
            modules_to_save=self.config.modules_to_save or None,
            task_type="CAUSAL_LM",
        )
        return with_adapter(model, config)


class Ia3(Adapter[Ia3Config]):
    """The adapter ``ia3``."""

    def wrap(self, model: Any) -> nn.Module:
        if self.config.layers is not None:
            raise ModelError("IA3 has no `layers` in PEFT", hint="name layers with their numbers in `target_modules`")
        targets = targets_of(model, self.config.target_modules)
        config = peft.IA3Config(
            target_modules=targets,
            feedforward_modules=[name for name in targets if name.endswith(tuple(self.config.feedforward_modules))],
            modules_to_save=self.config.modules_to_save or None,
            task_type="CAUSAL_LM",
        )
        return with_adapter(model, config)


class Oft(Adapter[OftConfig]):
    """The adapter ``oft``."""

    def wrap(self, model: Any) -> nn.Module:
        config = peft.OFTConfig(
            r=0,
            oft_block_size=self.config.block_size,
            module_dropout=self.config.dropout,
            target_modules=targets_of(model, self.config.target_modules),
            layers_to_transform=self.config.layers,
            modules_to_save=self.config.modules_to_save or None,
            task_type="CAUSAL_LM",
        )
        return with_adapter(model, config)


class PeftTuner(Adapter[PeftTunerConfig]):
    """The adapter ``peft``."""

    def wrap(self, model: Any) -> nn.Module:
        known = {item.value: made for item, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        kind = known.get(self.config.type.upper())
        if kind is None:
            near = get_close_matches(self.config.type.upper(), known, 1)
            raise ModelError(
                f"PEFT has no tuner '{self.config.type}'",
                hint=f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}",
            )
        names = {item.name for item in fields(kind)}
        for name in self.config.options:
            if name not in names:
                near = get_close_matches(name, names, 1)
                raise ModelError(
                    f"{kind.__name__} of PEFT has no field '{name}'",
                    hint=f"did you mean `{near[0]}`?" if near else f"it has {', '.join(sorted(names))}",
                )
        try:
            config: Any = kind(**{"task_type": "CAUSAL_LM", **self.config.options})
        except (TypeError, ValueError) as error:
            raise ModelError(f"{kind.__name__} of PEFT does not take these options: {error}") from error
        if config.is_prompt_learning:
            raise ModelError(
                f"a {self.config.type.upper()} adapter changes prompts and no weights: it cannot be folded or exported",
                hint="use a tuner of weights, such as LOHA, LOKR or BOFT",
            )
        return with_adapter(model, config)
