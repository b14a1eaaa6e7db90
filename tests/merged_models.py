"""What tests of merging share: merges without a stage, and models with one thing changed."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from luthier.api import Artifact
from luthier.merging.config import MergeConfig
from luthier.merging.engine import Engine, Settings
from luthier.merging.layout import Inputs, lay_out
from luthier.merging.reader import Weights
from luthier.merging.writer import Output
from luthier.registry import default_registry
from luthier.testing import resealed
from safetensors.torch import load_file, save_file

NAME = "model.layers.0.mlp.up_proj.weight"


def weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    """All tensors of a model."""
    return {name: tensor for path in artifact.path.glob("*.safetensors") for name, tensor in load_file(path).items()}


def merged_by(
    folder: Path, models: list[Artifact], base: Artifact | None, values: dict, seed: int = 0, **settings: int
) -> dict[str, torch.Tensor]:
    """What the engine makes, with no stage around it."""
    registry = default_registry()
    context = {"components": registry}
    given = {"models": ["m"] * len(models), "method": values, "dtype": "float32", **({"base": "b"} if base else {})}
    config = MergeConfig.model_validate(given, context=context)
    method = registry.impl_class(config.method.component)(config.method.config, None)
    inputs = Inputs([Weights(model) for model in models], Weights(base) if base else None)
    layout = lay_out(config, inputs, seed, config.dtype)
    # Loaded tensors are views of the file: each run has its own.
    folder = Path(tempfile.mkdtemp(dir=folder))
    output = Output(folder, layout.tensors, 1 << 30)
    Engine(method, output, Settings(**settings), lambda done, total: None).run(layout.jobs)
    output.close()
    return load_file(folder / "model.safetensors")


def changed(model: Artifact, folder: Path, change: Callable[[dict[str, torch.Tensor], dict], None]) -> Artifact:
    """A model with other tensors or another config."""
    shutil.copytree(model.path, folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return resealed(folder)


def with_nan(tensors: dict, config: dict) -> None:
    tensors[NAME][0, 0] = float("nan")


def with_infinity(tensors: dict, config: dict) -> None:
    tensors[NAME][-1, -1] = float("-inf")


def without_one(tensors: dict, config: dict) -> None:
    del tensors[NAME]


def with_one_more(tensors: dict, config: dict) -> None:
    tensors[NAME + "_scale"] = torch.ones(1)


def with_other_shape(tensors: dict, config: dict) -> None:
    tensors[NAME] = tensors[NAME][:-1].contiguous()


def with_integers(tensors: dict, config: dict) -> None:
    tensors[NAME] = tensors[NAME].to(torch.float8_e4m3fn)


def with_other_rope(tensors: dict, config: dict) -> None:
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5.0}


def tied(tensors: dict, config: dict) -> None:
    config["tie_word_embeddings"] = not config["tie_word_embeddings"]


def with_other_norms(tensors: dict, config: dict) -> None:
    config["rms_norm_eps"] = 0.5


def deeper(tensors: dict, config: dict) -> None:
    config["num_hidden_layers"] = 7


def with_a_bias(tensors: dict, config: dict) -> None:
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.ones(64)


def with_a_table(tensors: dict, config: dict) -> None:
    tensors["model.scale_table"] = torch.ones(3)


def with_more_rows(tensors: dict, config: dict) -> None:
    rows = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([rows, rows[:8]])
    config["vocab_size"] += 8
