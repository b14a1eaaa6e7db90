"""Loads and saves models, adapters and tokenizers, with nothing lost on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from luthier.api.artifact import Artifact
from luthier.api.errors import ModelError
from luthier.api.stages import Facts
from luthier.artifacts.adapters import adapter_facts, write_adapter_config
from luthier.artifacts.disk_space import check_disk_space
from luthier.artifacts.json_files import read_json
from luthier.artifacts.models import carry_text_files, model_facts, positions_in
from luthier.artifacts.tensors import tensor_headers
from luthier.modeling.streamed import Streamed, Whole

SHARD = 5_000_000_000
PROBED = 16
"""Tokens with which a folded adapter is compared to what it was."""
SAME = 1e-3
"""How much of the largest logit rounding may move one."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes of plain models, by their names in safetensors headers."""
HEADROOM = 1.5
"""How many times its size a model may need while it computes."""


def model_folder(artifact: Artifact) -> Path:
    """The folder of full weights: the artifact's own, or that of an adapter's base."""
    return artifact.base.path if artifact.kind == "adapter" else artifact.path


def load_tokenizer(artifact: Artifact) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or adapter."""
    tokenizer: Any = AutoTokenizer.from_pretrained(artifact.path, local_files_only=True)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def padding_of(tokenizer: Any) -> int:
    """The id that rows are padded with: masked out of attention and loss, so any serves, and none is added."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def load_model(
    artifact: Artifact,
    *,
    trainable: bool = False,
    options: Mapping[str, Any] | None = None,
    attention: str | None = None,
) -> Any:
    """A model in float32, with its adapter on top when the artifact is one.

    Args:
        artifact: A model or an adapter.
        trainable: Whether an adapter will be trained further.
        options: How to load it, or an adapter's base; by default in full precision, and for an adapter that will be
            trained further as its base was before; in the plain values of `luthier.api.Adapter.load_options`.
        attention: How attention is computed, by transformers' names; None: as it does by itself.

    Raises:
        ModelError: transformers cannot load it.
    """
    if options is None and trainable and artifact.kind == "adapter":
        options = artifact.facts.get("load_options")
    if artifact.kind != "adapter":
        return load_folder(artifact.path, options, attention)
    return load_adapter(artifact.path, model_folder(artifact), options, attention, trainable=trainable)


def load_folder(folder: Path, options: Mapping[str, Any] | None = None, attention: str | None = None) -> Any:
    """A folder with a full model, see `load_model`.

    Raises:
        ModelError: transformers cannot load it.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            **_arguments(options or {}),
            **({"attn_implementation": attention} if attention is not None else {}),
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"transformers cannot load the model: {error}", where=str(folder)) from error


def load_adapter(
    folder: Path,
    base: Path,
    options: Mapping[str, Any] | None = None,
    attention: str | None = None,
    *,
    trainable: bool = False,
) -> Any:
    """A folder with an adapter on the folder of its model, see `load_model`."""
    from peft import PeftModel, prepare_model_for_kbit_training

    model = load_folder(base, options, attention)
    if options and "quantization" in options:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    # Where PEFT looks whether the vocabulary was changed; what is stored names no folder.
    model.peft_config["default"].base_model_name_or_path = str(base)
    return model


def _arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """What ``from_pretrained`` is called with for load options."""
    unknown = sorted(set(options) - {"dtype", "quantization"})
    if unknown:
        raise ModelError(
            f"models cannot be loaded with the option '{unknown[0]}'", hint="`dtype` and `quantization` can"
        )
    found: dict[str, Any] = {"dtype": getattr(torch, options.get("dtype", "float32"))}
    if "quantization" in options:
        from transformers import BitsAndBytesConfig

        on_gpu = torch.cuda.is_available()
        computed = torch.bfloat16 if on_gpu else torch.float32
        found["quantization_config"] = BitsAndBytesConfig(**options["quantization"], bnb_4bit_compute_dtype=computed)
        found["device_map"] = {"": 0 if on_gpu else "cpu"}
    return found


def positions_of_model(model: Any) -> int | None:
    """How many tokens a loaded model was made for at once; None where it does not say."""
    return positions_in(model.config.to_dict())


def fold(model: Any) -> PreTrainedModel:
    """Fold an adapter into the full-precision weights it sits on; other models are returned unchanged.

    Raises:
        ModelError: PEFT cannot fold adapters of this kind.
    """
    if not hasattr(model, "merge_and_unload"):
        return model
    try:
        return model.merge_and_unload(safe_merge=True)
    except NotImplementedError as error:
        raise ModelError(f"PEFT cannot fold this adapter: {error}", hint="it works beside its model only") from error
    # So it says that what comes out is not finite.
    except ValueError as error:
        raise ModelError(f"the adapter cannot be folded into its model: {error}") from error


def to_best_device(model: Any) -> Any:
    """The model on the GPU, where there is one with room for it and for what it computes; else where it is."""
    if not torch.cuda.is_available():
        return model
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return model.to("cuda") if HEADROOM * size < torch.cuda.mem_get_info()[0] else model


def folded_by_peft(artifact: Artifact, scratch: Path) -> Path:
    """`scratch` with an adapter folded in by PEFT, in memory and in float32.

    Raises:
        ModelError: PEFT cannot, or folded in, it behaves differently.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    model = load_model(artifact)
    before = _answers(model)
    folded = fold(model)
    _check_alike(artifact, before, _answers(folded))
    check_disk_space(scratch, torch.float32.itemsize * folded.num_parameters(), "the model with the adapter folded in")
    folded.save_pretrained(scratch, max_shard_size=SHARD)
    carry_text_files(artifact.path, scratch)
    return scratch


def check_folded(artifact: Artifact, folder: Path) -> None:
    """Compare an adapter on its base with a folder that it was folded into.

    Raises:
        ModelError: they behave differently.
    """
    # One after the other: two would not fit where one does.
    before = _answers(load_model(artifact))
    _check_alike(artifact, before, _answers(load_folder(folder)))


def _check_alike(artifact: Artifact, before: torch.Tensor, after: torch.Tensor) -> None:
    difference = float((after - before).abs().max())
    if not difference <= SAME * float(before.abs().max()):
        raise ModelError(
            f"folded into its model, the adapter behaves differently: the scores of tokens differ by {difference:.3g}",
            where=str(artifact.path),
            hint="is the embedding tuned, and the output head tied to it? then it cannot be folded; "
            "train with an untied head",
        )


def _answers(model: Any) -> torch.Tensor:
    """The logits after a few tokens, whichever they are."""
    rows = model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        return model(input_ids=torch.arange(0, rows, max(1, rows // PROBED))[None, :PROBED]).logits


def dequantized(artifact: Artifact, scratch: Path) -> Artifact:
    """The model, or what it stands for in float32 when it is quantized in a layout that transformers alone cannot load.

    Args:
        scratch: A folder for the weights in float32.
    """
    from luthier.modeling.quantized import READABLE, read_floats
    from luthier.modeling.shards import ShardWriter

    if artifact.kind != "model":
        return artifact
    config = read_json(artifact.path / "config.json")
    if (config.get("quantization_config") or {}).get("quant_method") not in READABLE:
        return artifact
    if (scratch / "config.json").exists():
        # Written last: it was done before.
        return replace(artifact, path=scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    parameters: int = artifact.facts.get("parameters") or model_facts(artifact.path)["parameters"]
    check_disk_space(scratch, torch.float32.itemsize * parameters, "what is computed with")
    writer = ShardWriter(scratch, SHARD)
    for name, tensor in read_floats(artifact.path):
        writer.add(name, tensor)
    writer.close()
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    (scratch / "config.json").write_text(json.dumps(plain), encoding="utf-8")
    carry_text_files(artifact.path, scratch)
    return replace(artifact, path=scratch)


def load_client(artifact: Artifact, scratch: Path) -> Any:
    """A model as the programs that serve its folder compute it, for comparing and trying out.

    Args:
        scratch: A folder for weights in float32, where they are quantized.
    """
    from luthier.modeling.activations import round_activations

    model = to_best_device(load_model(dequantized(artifact, scratch)))
    if artifact.kind == "model":
        round_activations(model, artifact.path)
    return model


def stream_client(artifact: Artifact, scratch: Path, dtype: torch.dtype = torch.float32) -> Streamed | Whole:
    """A model as the programs that serve its folder compute it, layer by layer, for comparing.

    Args:
        scratch: A folder for weights in float32, where they are quantized.
        dtype: What it is computed in.
    """
    from luthier.modeling.activations import round_activations

    floats = dequantized(artifact, scratch)
    if "quantization_config" in read_json(floats.path / "config.json"):
        # What transformers alone can read it loads as a whole.
        whole: Any = load_model(floats).eval()
        for parameter in (item for item in whole.parameters() if item.is_floating_point()):
            parameter.data = parameter.data.to(dtype)
        return Whole(to_best_device(whole))
    client = Streamed(floats.path, dtype=dtype)
    round_activations(client.model, artifact.path)
    return client


def save_model(model: Any, source: Artifact, out: Path, dtypes: Mapping[str, torch.dtype], dtype: torch.dtype) -> Facts:
    """Write a full model and the text files of the one it came from, its config included; return its facts.

    Args:
        model: The model.
        source: The one that it came from.
        out: The folder.
        dtypes: What parameters and buffers are stored in, by name, ...
        dtype: ... and all others.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes.get(name, dtype))
    # A shard is in memory twice while it is written.
    model.save_pretrained(out, max_shard_size=SHARD)
    config = read_json(source.path / "config.json")
    if dtype != stored_dtype(source):
        config = with_dtype(config, str(dtype).removeprefix("torch."))
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    carry_text_files(source.path, out)
    return model_facts(out)


def with_dtype(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A config that says another dtype, under the names that it uses, for its parts as well."""
    inner = {key: with_dtype(value, name) for key, value in config.items() if key.endswith("_config") and value}
    known = [key for key in ("dtype", "torch_dtype") if key in config]
    top = known or (["dtype"] if "model_type" in config and "architectures" in config else [])
    return {**config, **inner, **dict.fromkeys(top, name)}


def save_adapter(
    model: Any,
    source: Artifact,
    out: Path,
    load_options: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    initial: Path | None = None,
) -> Facts:
    """Write the adapter named ``default`` and the text files; return its facts.

    Args:
        model: The model with the adapter.
        source: The model or adapter that it was made from.
        out: The folder.
        load_options: How its base was loaded.
        dtype: What its weights are stored in.
        initial: The adapter as it began, where that was taken off its base: what is stored is the difference, of twice
            the rank, and sits on the base as it was.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
    more = {"path_initial_model_for_weight_conversion": str(initial)} if initial is not None else {}
    model.save_pretrained(out, selected_adapters=["default"], **more)
    (out / "README.md").unlink(missing_ok=True)
    carry_text_files(source.path, out)
    base = source.base if source.kind == "adapter" else source
    write_adapter_config(out, base)
    # The folder it was loaded from means nothing elsewhere; the key says which model it is.
    facts = adapter_facts(out, source.facts["base"] if source.kind == "adapter" else source.key, source)
    return {**facts, "load_options": dict(load_options)} if load_options else facts


def stored_dtypes(source: Artifact) -> dict[str, torch.dtype]:
    """The dtypes of a model's tensors in its files, by their names there."""
    headers = tensor_headers(source.path)
    return {name: DTYPES[header.dtype] for name, header in headers.items() if header.dtype in DTYPES}


def stored_dtype(source: Artifact) -> torch.dtype:
    """The dtype that most of a model's weights are stored in; float32 where it is none of a plain model's."""
    return DTYPES.get(source.facts["dtype"], torch.float32)
