"""LoRA (Hu et al. 2021, arXiv:2106.09685), DoRA (Liu et al. 2024, arXiv:2402.09353) and QLoRA
(Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

from typing import Any

import peft
import torch
from luthier_plugins.adapters.config import LoraConfig, QloraConfig
from torch import nn


class Lora:
    """The adapter ``lora``."""

    use_dora = False

    def __init__(self, config: LoraConfig) -> None:
        self.config = config

    def load_options(self) -> dict[str, Any]:
        return {}

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

    config: QloraConfig

    def load_options(self) -> dict[str, Any]:
        from transformers import BitsAndBytesConfig

        on_gpu = torch.cuda.is_available()
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.config.double_quant,
            bnb_4bit_compute_dtype=torch.bfloat16 if on_gpu else torch.float32,
        )
        return {"quantization_config": quantization, "device_map": {"": 0 if on_gpu else "cpu"}}

    def wrap(self, model: Any) -> nn.Module:
        return super().wrap(peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))
