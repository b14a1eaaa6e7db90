"""LoRA (Hu et al. 2021, arXiv:2106.09685), DoRA (Liu et al. 2024, arXiv:2402.09353) and QLoRA
(Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

from typing import Any

import peft
from luthier.api import Adapter
from luthier_plugins.adapters.config import LoraConfig, QloraConfig
from torch import nn


class Lora(Adapter[LoraConfig]):
    """The adapter ``lora``."""

    use_dora = False

    def wrap(self, model: Any) -> nn.Module:
        config = peft.LoraConfig(
            r=self.config.r,
            lora_alpha=self.config.lora_alpha,  # pyright: ignore[reportArgumentType] - PEFT takes floats too
            lora_dropout=self.config.lora_dropout,
            target_modules=self.config.target_modules,
            use_dora=self.use_dora,
            task_type="CAUSAL_LM",
        )
        return peft.get_peft_model(model, config)


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
