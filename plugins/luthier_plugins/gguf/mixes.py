"""Which tensor gets which type in a file such as Q4_K_M: llama.cpp's rule for dense models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from luthier_plugins.gguf.config import FileType

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

T = GGMLQuantizationType

FILE_TYPES: dict[FileType, tuple[LlamaFileType, GGMLQuantizationType]] = {
    "F32": (LlamaFileType.ALL_F32, T.F32),
    "F16": (LlamaFileType.MOSTLY_F16, T.F16),
    "BF16": (LlamaFileType.MOSTLY_BF16, T.BF16),
    "Q8_0": (LlamaFileType.MOSTLY_Q8_0, T.Q8_0),
    "Q6_K": (LlamaFileType.MOSTLY_Q6_K, T.Q6_K),
    "Q5_K_M": (LlamaFileType.MOSTLY_Q5_K_M, T.Q5_K),
    "Q5_K_S": (LlamaFileType.MOSTLY_Q5_K_S, T.Q5_K),
    "Q4_K_M": (LlamaFileType.MOSTLY_Q4_K_M, T.Q4_K),
    "Q4_K_S": (LlamaFileType.MOSTLY_Q4_K_S, T.Q4_K),
    "Q3_K_L": (LlamaFileType.MOSTLY_Q3_K_L, T.Q3_K),
    "Q3_K_M": (LlamaFileType.MOSTLY_Q3_K_M, T.Q3_K),
    "Q3_K_S": (LlamaFileType.MOSTLY_Q3_K_S, T.Q3_K),
    "Q2_K": (LlamaFileType.MOSTLY_Q2_K, T.Q2_K),
}
"""The file's number in its header, and the type of most of its tensors."""

FALLBACKS = {T.Q2_K: T.Q4_0, T.Q3_K: T.Q4_0, T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0}
"""What takes the place of a type whose blocks of 256 do not divide a row."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What the rule looks at beside a tensor's name."""

    layers: int
    heads: int
    kv_heads: int
    tied: bool


def tensor_type(file_type: FileType, name: str, shape: Sequence[int], layout: Layout) -> GGMLQuantizationType:
    """The type of one tensor.

    Args:
        file_type: The kind of file.
        name: The tensor's name in GGUF, such as ``blk.3.attn_v.weight``.
        shape: Its shape, rows first.
    """
    default = FILE_TYPES[file_type][1]
    if len(shape) == 1 or "_norm" in name or default == T.F32:
        return T.F32
    if default in (T.F16, T.BF16):
        return default
    return _that_fits(_wanted(file_type, default, name, layout), shape[-1])


def _wanted(file_type: FileType, default: GGMLQuantizationType, name: str, layout: Layout) -> GGMLQuantizationType:
    if name == "output.weight" or (name == "token_embd.weight" and layout.tied):
        return T.Q8_0 if default == T.Q8_0 else T.Q6_K
    parts = name.split(".")
    if parts[0] != "blk":
        return default
    layer, role = int(parts[1]), parts[2]
    if role == "attn_v":
        return _attention_value(file_type, default, layer, layout)
    if role == "ffn_down":
        return _ffn_down(file_type, default, layer, layout.layers)
    if role == "attn_output":
        return {"Q2_K": T.Q3_K, "Q3_K_M": T.Q4_K, "Q3_K_L": T.Q5_K}.get(file_type, default)
    return default


def _attention_value(
    file_type: FileType, default: GGMLQuantizationType, layer: int, layout: Layout
) -> GGMLQuantizationType:
    match file_type:
        case "Q4_K_M" | "Q5_K_M":
            return T.Q6_K if _more_bits(layer, layout.layers) else default
        case "Q4_K_S":
            return T.Q5_K if layer < 4 else default
        case "Q3_K_L":
            return T.Q5_K
        case "Q3_K_M":
            return T.Q5_K if layer < 2 else T.Q4_K
        case "Q2_K":
            return T.Q4_K if layout.heads // layout.kv_heads >= 4 else T.Q3_K
        case _:
            return default


def _ffn_down(file_type: FileType, default: GGMLQuantizationType, layer: int, layers: int) -> GGMLQuantizationType:
    match file_type:
        case "Q4_K_M" | "Q5_K_M":
            return T.Q6_K if _more_bits(layer, layers) else default
        case "Q4_K_S":
            return T.Q5_K if layer < layers // 8 else default
        case "Q3_K_L":
            return T.Q5_K
        case "Q3_K_M":
            return T.Q5_K if layer < layers // 16 else T.Q4_K
        case "Q2_K":
            return T.Q3_K
        case _:
            return default


def _more_bits(layer: int, layers: int) -> bool:
    """Whether a layer is among those kept finer: the first and last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _that_fits(wanted: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    if columns % GGML_QUANT_SIZES[wanted][0] == 0:
        return wanted
    smaller = FALLBACKS.get(wanted, T.F16)
    return smaller if columns % GGML_QUANT_SIZES[smaller][0] == 0 else T.F16
