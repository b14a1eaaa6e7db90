"""The stage ``moe``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack, closing
from typing import Any

import torch
from luthier.api import Facts, ModelError, Stage, StageContext
from luthier.artifacts.disk_space import check_disk_space
from luthier.artifacts.json_files import write_json
from luthier.artifacts.models import carry_licences, model_facts
from luthier.merging.chat_template import template_choice_of, write_template_choice
from luthier.merging.check import check_stored
from luthier.merging.files import DTYPES, Scratch
from luthier.merging.layout import NAMES, Inputs
from luthier.merging.merge import carry, open_inputs
from luthier.merging.reader import Source, full_of, whole
from luthier.merging.verify import Verifier
from luthier.merging.writer import Described, Output, size_of
from luthier_plugins.merge.moe.config import MoeConfig
from luthier_plugins.merge.moe.families import FAMILIES, Family
from luthier_plugins.merge.moe.router import from_prompts
from torch import Tensor

FEED_FORWARD = re.compile(r"^(model\.layers\.\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight$")
SPREAD = 0.02
"""The standard deviation of random routers, that of Mixtral's own initialization."""


class Moe(Stage[MoeConfig]):
    """Experts side by side after a new router in each layer (Jiang et al. 2024, arXiv:2401.04088); the idea of making
    them from dense models is that of sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055).
    """

    def run(self) -> Facts:
        context = self.context
        with ExitStack() as stack:
            verifier = stack.enter_context(Verifier(context.out))
            experts = [context.artifact(expert.model) for expert in self.config.experts]
            inputs = open_inputs(experts, context.artifact(self.config.base), context, stack)
            check_stored(inputs, "experts")
            base = inputs.lead
            family = FAMILIES[str(base.config["architectures"][0])]
            if self.config.router == "uniform" and self.config.experts_per_token < len(experts):
                context.warn("routers without preference send every token to the first experts until they are trained")
            _check(inputs, family)
            tensors = self._tensors(base, family)
            check_disk_space(context.out, size_of(tensors), "the model of experts")
            output = stack.enter_context(closing(Output(context.out, tensors, self.config.shard_size)))
            self._write(output, inputs, family, self._routers(base, context), context)
            carry(base.artifact, context.out)
            special = write_template_choice(template_choice_of(None, inputs), inputs, context)
            for expert in inputs.models:
                carry_licences(full_of(expert.artifact).path, context.out, expert.label)
            write_json(context.out / "config.json", {**self._config(base.config, family), **special})
            proof = verifier.verdict(meanwhile=output.sync)
        return {**model_facts(context.out), "experts": len(experts), "router": self.config.router, "proof": proof}

    def _tensors(self, base: Source, family: Family) -> dict[str, Described]:
        found: dict[str, Described] = {}
        count, hidden = len(self.config.experts), int(base.config["hidden_size"])
        silent = family.silent(int(base.config["intermediate_size"]))
        for name, header in base.headers.items():
            dtype = NAMES[self.config.dtype] if self.config.dtype and header.dtype in DTYPES else header.dtype
            match = FEED_FORWARD.match(name)
            if match is None:
                found[name] = Described(dtype, header.shape)
                continue
            block = f"{match[1]}.{family.block}"
            found.setdefault(f"{block}.gate.weight", Described(dtype, (count, hidden)))
            for expert in range(count):
                found[f"{block}.experts.{expert}.{family.names[match[2]]}.weight"] = Described(dtype, header.shape)
            if family.shared:
                shape = (hidden, silent) if match[2] == "down_proj" else (silent, hidden)
                found[f"{block}.shared_expert.{match[2]}.weight"] = Described(dtype, shape)
                found.setdefault(f"{block}.shared_expert_gate.weight", Described(dtype, (1, hidden)))
        return found

    def _routers(self, base: Source, context: StageContext) -> list[Tensor]:
        """A router for each layer, float32, shape (experts, hidden)."""
        layers, hidden = int(base.config["num_hidden_layers"]), int(base.config["hidden_size"])
        count = len(self.config.experts)
        if self.config.router == "prompts":
            return from_prompts(context.artifact(self.config.base), [expert.prompts for expert in self.config.experts])
        if self.config.router == "uniform":
            return [torch.zeros(count, hidden) for _ in range(layers)]
        generator = torch.Generator().manual_seed(context.seed)
        return [torch.randn(count, hidden, generator=generator) * SPREAD for _ in range(layers)]

    def _write(
        self, output: Output, inputs: Inputs, family: Family, routers: list[Tensor], context: StageContext
    ) -> None:
        scratch = Scratch()
        base = inputs.lead
        noise = torch.Generator().manual_seed(context.seed)
        for done, name in enumerate(base.headers):
            context.progress(done, len(base.headers), "tensors")
            match = FEED_FORWARD.match(name)
            sources: Mapping[str, Source] = {name: base}
            if match is not None:
                block = f"{match[1]}.{family.block}"
                if match[2] == "gate_proj":
                    layer = int(match[1].rpartition(".")[2])
                    output.write(f"{block}.gate.weight", 0, routers[layer].reshape(-1), scratch)
                if family.shared:
                    _write_shared(output, base, name, block, noise)
                sources = {
                    f"{block}.experts.{place}.{family.names[match[2]]}.weight": model
                    for place, model in enumerate(inputs.models)
                }
            for target, source in sources.items():
                if base.headers[name].dtype in DTYPES:
                    output.write(target, 0, whole(source, name).reshape(-1), scratch)
                else:
                    raw = scratch.raw(base.headers[name].size)
                    base.raw(name, 0, raw)
                    output.raw(target, 0, raw)

    def _config(self, base: Mapping[str, Any], family: Family) -> dict[str, Any]:
        made = family.config(base, len(self.config.experts), self.config.experts_per_token)
        return {**made, **({"dtype": self.config.dtype} if self.config.dtype else {})}


def _write_shared(output: Output, base: Source, name: str, block: str, noise: torch.Generator) -> None:
    """One matrix of the shared expert: it computes with the base's first neurons, and adds nothing, so that nothing
    changes and yet it can learn.
    """
    scratch = Scratch()
    which = name.split(".")[-2]
    target = f"{block}.shared_expert.{which}.weight"
    if which == "down_proj":
        output.write(target, 0, torch.zeros(output.tensors[target].shape), scratch)
        gate = f"{block}.shared_expert_gate.weight"
        # At random, because llama.cpp divides by the gate's output.
        output.write(gate, 0, torch.randn(output.tensors[gate].shape, generator=noise) * SPREAD, scratch)
    else:
        output.write(target, 0, whole(base, name)[: output.tensors[target].shape[0]].reshape(-1), scratch)


def _feed_forward(model: Source) -> dict[str, list[int]]:
    return {name: list(header.shape) for name, header in model.headers.items() if FEED_FORWARD.match(name)}


def _check(inputs: Inputs, family: Family) -> None:
    base = inputs.lead
    problems: list[str] = []
    biases = ("mlp_bias",) if family.biases else ("mlp_bias", "attention_bias")
    if any(base.config.get(name) for name in biases):
        problems.append(f"{base.label} has biases, which a {family.model_type} has not")
    layers = _feed_forward(base)
    for expert in inputs.models:
        theirs = _feed_forward(expert)
        odd = sorted(name for name in {*layers, *theirs} if layers.get(name) != theirs.get(name))
        if odd:
            problems.append(
                f"{odd[0]} is {theirs.get(odd[0])} in {expert.label} and {layers.get(odd[0])} in {base.label}"
            )
        if expert.config.get("hidden_act") != base.config.get("hidden_act"):
            problems.append(f"{expert.label} has a different activation from {base.label}")
    if problems:
        raise ModelError("; ".join(problems), hint="experts and base must be tuned from the same model")
