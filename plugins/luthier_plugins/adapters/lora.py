"""LoRA (Hu et al. 2021, arXiv:2106.09685), DoRA (Liu et al. 2024, arXiv:2402.09353) and QLoRA
(Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
from luthier.api import Adapter, ModelError
from luthier.modeling.adapter_targets import (
    check_targets,
    ends_of,
    fused_parameters,
    has_experts,
    last_names,
    routers,
    taken_for_experts,
)
from luthier.modeling.fresh_adapters import INITIAL, make_up_for_quantizing, token_ids, with_adapter
from luthier_plugins.adapters.config import LoraConfig, QloraConfig
from torch import nn

INITS = {"zero": True, "gaussian": "gaussian", "pissa": "pissa", "loftq": True}


class Lora(Adapter[LoraConfig]):
    """The adapter ``lora``."""

    use_dora = False

    def wrap(self, model: Any) -> nn.Module:
        wanted = self.config.target_modules
        everything = wanted == "all-linear"
        if isinstance(wanted, list):
            check_targets(model, wanted)
        if self.config.init == "loftq" and not isinstance(self, Qlora):
            raise ModelError(
                "`init: loftq` makes up for what quantizing the base took away",
                hint="use the adapter `qlora`, or leave `init` out",
            )
        fused = fused_parameters(model) if everything and not self.use_dora else []
        lost, rest = taken_for_experts(model, last_names(model) if everything else wanted)
        if lost and (self.use_dora or self.load_options()):
            if not everything:
                raise ModelError(
                    f"PEFT has no such adapter for {lost[0]}, whose name it reads as that of experts",
                    hint="name other layers under `target_modules`, or use the adapter `lora`",
                )
            lost = []
        elif lost:
            fused = [*fused, *lost]
            everything = everything and has_experts(model)
            wanted = "all-linear" if everything else rest
        fused = ends_of(fused, self.config.layers)
        config = peft.LoraConfig(
            r=self.config.r,
            lora_alpha=self.config.lora_alpha,  # pyright: ignore[reportArgumentType] - PEFT takes floats too
            lora_dropout=0.0 if fused else self.config.lora_dropout,
            target_modules=wanted if self.config.layers is None or not everything else last_names(model),
            target_parameters=[*self.config.target_parameters, *fused] or None,
            # Routers are linear layers of a kind of their own, whose results are more than a tensor.
            exclude_modules=routers(model) if everything else None,
            layers_to_transform=self.config.layers,
            modules_to_save=self.config.modules_to_save or None,
            trainable_token_indices=token_ids(model, self.config.tokens) or None,
            use_rslora=self.config.rslora,
            use_dora=self.use_dora,
            bias=self.config.bias,
            init_lora_weights=INITS[self.config.init],  # pyright: ignore[reportArgumentType]
            task_type="CAUSAL_LM",
        )
        if fused and self.config.lora_dropout:
            self.context.warn(f"PEFT has no dropout before adapters of {', '.join(fused)}: `lora_dropout` is left out")
        wrapped = with_adapter(model, config)
        if self.config.init == "pissa":
            # What it began as is taken off again when it is saved: the base in the store is the one without it.
            folder = self.context.scratch / INITIAL
            wrapped.peft_config["default"].init_lora_weights = True
            wrapped.save_pretrained(folder)
            wrapped.peft_config["default"].init_lora_weights = "pissa"
        return wrapped

    def learning_rate_scale(self, name: str) -> float:
        ratio = self.config.lora_plus_ratio
        return ratio if ratio is not None and ".lora_B." in name else 1.0


class Dora(Lora):
    """The adapter ``dora``."""

    use_dora = True


class Qlora(Lora):
    """The adapter ``qlora``."""

    config: QloraConfig  # type: ignore[assignment] - its own settings beside those of `lora`

    def load_options(self) -> dict[str, Any]:
        if self.config.bits == 8:
            return {"quantization": {"load_in_8bit": True}}
        return {
            "quantization": {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": self.config.quant_type,
                "bnb_4bit_use_double_quant": self.config.double_quant,
            }
        }

    def wrap(self, model: Any) -> nn.Module:
        wrapped = super().wrap(peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))
        if self.config.init == "loftq":
            make_up_for_quantizing(wrapped, Path(model.config.name_or_path))
        return wrapped
