"""The stage ``moe``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack, closing
from typing import Any

import torch
from luthier.api import Facts, ModelError, StageContext
from luthier.artifacts.models import model_facts
from luthier.artifacts.room import check_room
from luthier_plugins.merge.layout import NAMES, Inputs
from luthier_plugins.merge.merging import carry, open_inputs
from luthier_plugins.merge.moe.config import MoeConfig
from luthier_plugins.merge.moe.router import from_prompts
from luthier_plugins.merge.reader import Scratch, Source, dump_json, whole
from luthier_plugins.merge.verify import Verifier
from luthier_plugins.merge.writer import Described, Output, size_of
from torch import Tensor

FEED_FORWARD = re.compile(r"^(model\.layers\.\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight$")
MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
SPREAD = 0.02
"""The standard deviation of random routers, that of Mixtral's own initialization."""


class Moe:
    """Experts side by side behind a new router in each layer (Jiang et al. 2024, arXiv:2401.04088); the idea of making
    them from dense models is that of sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055).
    """

    def __init__(self, config: MoeConfig) -> None:
        self.config = config

    def run(self, context: StageContext) -> Facts:
        with ExitStack() as stack:
            verifier = stack.enter_context(Verifier(context.out))
            experts = [context.input(f"experts.{place}.model") for place in range(len(self.config.experts))]
            inputs = open_inputs(experts, context.input("base"), context, stack)
            base = inputs.lead
            _check(inputs)
            tensors = self._tensors(base)
            check_room(context.out, size_of(tensors), "the model of experts")
            output = stack.enter_context(closing(Output(context.out, tensors, self.config.shard_size)))
            self._write(output, inputs, self._routers(base, context), context)
            carry(base.artifact, context.out)
            dump_json(context.out / "config.json", self._config(base.config))
            proof = verifier.verdict(meanwhile=output.sync)
        return {**model_facts(context.out), "experts": len(experts), "router": self.config.router, "proof": proof}

    def _tensors(self, base: Source) -> dict[str, Described]:
        found: dict[str, Described] = {}
        count = len(self.config.experts)
        for name, header in base.headers.items():
            dtype = NAMES[self.config.dtype] if self.config.dtype else header.dtype
            match = FEED_FORWARD.match(name)
            if match is None:
                found[name] = Described(dtype, header.shape)
                continue
            block = f"{match[1]}.block_sparse_moe"
            found.setdefault(f"{block}.gate.weight", Described(dtype, (count, int(base.config["hidden_size"]))))
            for expert in range(count):
                found[f"{block}.experts.{expert}.{MIXTRAL[match[2]]}.weight"] = Described(dtype, header.shape)
        return found

    def _routers(self, base: Source, context: StageContext) -> list[Tensor]:
        """A router for each layer, float32, shape (experts, hidden)."""
        layers, hidden = int(base.config["num_hidden_layers"]), int(base.config["hidden_size"])
        count = len(self.config.experts)
        if self.config.router == "prompts":
            return from_prompts(context.input("base"), [expert.prompts for expert in self.config.experts])
        if self.config.router == "uniform":
            return [torch.zeros(count, hidden) for _ in range(layers)]
        generator = torch.Generator().manual_seed(context.seed)
        return [torch.randn(count, hidden, generator=generator) * SPREAD for _ in range(layers)]

    def _write(self, output: Output, inputs: Inputs, routers: list[Tensor], context: StageContext) -> None:
        scratch = Scratch()
        base = inputs.lead
        for done, name in enumerate(base.headers):
            context.progress(done, len(base.headers), "tensors")
            match = FEED_FORWARD.match(name)
            sources: Mapping[str, Source] = {name: base}
            if match is not None:
                block = f"{match[1]}.block_sparse_moe"
                if match[2] == "gate_proj":
                    layer = int(match[1].rpartition(".")[2])
                    output.write(f"{block}.gate.weight", 0, routers[layer].reshape(-1), scratch)
                sources = {f"{block}.experts.{place}.{MIXTRAL[match[2]]}.weight": model
                           for place, model in enumerate(inputs.models)}  # fmt: skip
            for target, source in sources.items():
                output.write(target, 0, whole(source, name).reshape(-1), scratch)

    def _config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        dropped = ("mlp_bias", "attention_bias", "pretraining_tp")
        long = {"dtype": self.config.dtype} if self.config.dtype else {}
        return {
            **{key: value for key, value in base.items() if key not in dropped},
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": len(self.config.experts),
            "num_experts_per_tok": self.config.experts_per_token,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "sliding_window": base.get("sliding_window"),
            **long,
        }


def _feed_forward(model: Source) -> dict[str, list[int]]:
    return {name: list(header.shape) for name, header in model.headers.items() if FEED_FORWARD.match(name)}


def _check(inputs: Inputs) -> None:
    base = inputs.lead
    problems: list[str] = []
    if base.config.get("mlp_bias") or base.config.get("attention_bias"):
        problems.append(f"{base.label} has biases, which Mixtral has not")
    layers = _feed_forward(base)
    for expert in inputs.models:
        theirs = _feed_forward(expert)
        odd = sorted(name for name in {*layers, *theirs} if layers.get(name) != theirs.get(name))
        if odd:
            problems.append(
                f"{odd[0]} is {theirs.get(odd[0])} in {expert.label} and {layers.get(odd[0])} in {base.label}"
            )
        if expert.config.get("hidden_act") != base.config.get("hidden_act"):
            problems.append(f"{expert.label} has another activation than {base.label}")
    if problems:
        raise ModelError("; ".join(problems), hint="experts and base have to be tuned from one model")
