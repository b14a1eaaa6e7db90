"""LoRA (Hu et al. 2021, arXiv:2106.09685), DoRA (Liu et al. 2024, arXiv:2402.09353) and QLoRA
(Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

from typing import Any

import peft
from luthier.api import Adapter, ModelError
from luthier.modeling.adapters import check_targets, routers
from luthier_plugins.adapters.config import LoraConfig, QloraConfig
from torch import nn


class Lora(Adapter[LoraConfig]):
    """The adapter ``lora``."""

    use_dora = False

    def wrap(self, model: Any) -> nn.Module:
        wanted = self.config.target_modules
        if isinstance(wanted, list):
            check_targets(model, wanted)
        config = peft.LoraConfig(
            r=self.config.r,
            lora_alpha=self.config.lora_alpha,  # pyright: ignore[reportArgumentType] - PEFT takes floats too
            lora_dropout=self.config.lora_dropout,
            target_modules=wanted,
            # Routers are linear layers of a kind of their own, whose results are more than a tensor.
            exclude_modules=routers(model) if wanted == "all-linear" else None,
            use_dora=self.use_dora,
            task_type="CAUSAL_LM",
        )
        try:
            return peft.get_peft_model(model, config)
        # PEFT knows of some architectures that its adapters do not go with.
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ModelError(
                f"PEFT cannot put the adapter on this model: {str(error).strip().partition(chr(10))[0]}",
                hint="name other layers under `target_modules`",
            ) from error


class Dora(Lora):
    """The adapter ``dora``."""

    use_dora = True


class Qlora(Lora):
    """The adapter ``qlora``."""

    config: QloraConfig  # type: ignore[assignment] - its own settings beside those of `lora`

    def load_options(self) -> dict[str, Any]:
        double = self.config.double_quant
        return {
            "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
        }

    def wrap(self, model: Any) -> nn.Module:
        return super().wrap(peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))
