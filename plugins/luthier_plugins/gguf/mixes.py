"""Which tensor gets which type in a file such as Q4_K_M: llama.cpp's rule, with `luthier_plugins.gguf.config.FileType`.

The rule was found by comparison with ``llama_model_quantize``; `tests/oracle/test_llama_quantize.py` compares again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from luthier_plugins.gguf.config import FileType

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

T = GGMLQuantizationType

MOSTLY: dict[FileType, GGMLQuantizationType] = {
    "F32": T.F32, "F16": T.F16, "BF16": T.BF16, "Q8_0": T.Q8_0, "Q6_K": T.Q6_K, "Q5_K_M": T.Q5_K, "Q5_K_S": T.Q5_K,
    "Q4_K_M": T.Q4_K, "Q4_K_S": T.Q4_K, "Q3_K_L": T.Q3_K, "Q3_K_M": T.Q3_K, "Q3_K_S": T.Q3_K, "Q2_K": T.Q2_K,
    "Q5_1": T.Q5_1, "Q5_0": T.Q5_0, "Q4_1": T.Q4_1, "Q4_0": T.Q4_0, "IQ4_NL": T.IQ4_NL, "IQ4_XS": T.IQ4_XS,
    "IQ3_M": T.IQ3_S, "IQ3_S": T.IQ3_S, "IQ3_XS": T.IQ3_S, "IQ3_XXS": T.IQ3_XXS, "IQ2_M": T.IQ2_S, "IQ2_S": T.IQ2_XS,
    "IQ2_XS": T.IQ2_XS, "IQ2_XXS": T.IQ2_XXS, "IQ1_M": T.IQ1_M, "IQ1_S": T.IQ1_S,
}  # fmt: skip
"""The type of most of a file's tensors."""
SMALLEST = ("IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
"""Below 3 bits, where the rule is a different one."""
FALLBACKS = {T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0, T.Q2_K: T.Q4_0, T.Q3_K: T.Q4_0, T.IQ4_XS: T.IQ4_NL,
             T.IQ3_S: T.IQ4_NL, T.IQ3_XXS: T.IQ4_NL, T.IQ2_S: T.IQ4_NL, T.IQ2_XS: T.IQ4_NL, T.IQ2_XXS: T.IQ4_NL,
             T.IQ1_M: T.IQ4_NL, T.IQ1_S: T.IQ4_NL}  # fmt: skip
"""What takes the place of a type whose blocks of 256 do not divide a row."""
NEEDS_IMATRIX = (T.IQ3_XXS, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ1_S, T.IQ1_M)
"""Types so small that what is rounded away must be chosen by what matters."""
GROUPED = 4
"""Query heads for each key and value head from which these are worth more bits."""
BIG = 80
"""Layers of the models of 70 B parameters, whose values get more bits."""


def file_type_number(file_type: FileType) -> LlamaFileType:
    """The file's number in its header."""
    name = {"F32": "ALL_F32"}.get(file_type, f"MOSTLY_{file_type}")
    return LlamaFileType[name]


@dataclass(frozen=True, slots=True)
class Layout:
    """What the rule uses besides a tensor's name.

    Attributes:
        downs: The names of the ``ffn_down`` tensors in the order of the file; a layer with experts may have two.
        overrides: Types by regular expressions for names in GGUF; the first that is found in a name counts.
        imatrix: Whether there are importances.
    """

    layers: int
    heads: int
    kv_heads: int
    tied: bool
    experts: int = 0
    downs: Sequence[str] = ()
    overrides: Mapping[str, str] = field(default_factory=dict[str, str])
    imatrix: bool = False

    @property
    def grouped(self) -> bool:
        return self.heads // self.kv_heads >= GROUPED

    def more_bits(self, layer: int) -> bool:
        """Whether a layer is among those kept finer: the first and last eighth, and every third between."""
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2

    def early(self, layer: int, share: int = 8) -> bool:
        """Whether a layer is in the first of so many parts of the model."""
        return layer < self.layers // share


def is_quantized(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor has fewer bits in smaller files: matrices, without those that choose experts."""
    return len(shape) > 1 and name.endswith(".weight") and "_norm" not in name and "ffn_gate_inp" not in name


def tensor_type(file_type: FileType, name: str, shape: Sequence[int], layout: Layout) -> GGMLQuantizationType:
    """The type of one tensor.

    Args:
        file_type: The kind of file.
        name: The tensor's name in GGUF, such as ``blk.3.attn_v.weight``.
        shape: Its shape, rows first.
    """
    default = MOSTLY[file_type]
    if not is_quantized(name, shape) or default == T.F32:
        return T.F32
    for pattern, chosen in layout.overrides.items():
        if re.search(pattern, name):
            return that_fits(T[chosen], shape[-1])
    if default in (T.F16, T.BF16):
        return default
    return that_fits(_wanted(file_type, default, name, shape, layout), shape[-1])


def that_fits(wanted: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    """The type, or what takes its place where its blocks do not divide a row."""
    if columns % GGML_QUANT_SIZES[wanted][0] == 0:
        return wanted
    smaller = FALLBACKS.get(wanted, T.F16)
    return smaller if columns % GGML_QUANT_SIZES[smaller][0] == 0 else T.F16


def _wanted(
    file_type: FileType, default: GGMLQuantizationType, name: str, shape: Sequence[int], layout: Layout
) -> GGMLQuantizationType:
    if name == "output.weight" or (name == "token_embd.weight" and layout.tied):
        return _output(file_type, default, shape[-1])
    if name == "token_embd.weight":
        return _embedding(file_type, default)
    parts = name.split(".")
    if parts[0] != "blk":
        return default
    layer, role = int(parts[1]), parts[2]
    if file_type in SMALLEST:
        return _below_three_bits(file_type, default, name, role, layout)
    match role:
        case "attn_v" | "attn_qkv":
            return _attention_value(file_type, default, layer, layout)
        case "attn_q" | "attn_k":
            return _attention_key(file_type, default, role, layout)
        case "attn_output":
            return _attention_output(file_type, default, layout)
        case "ffn_down" | "ffn_down_exps" | "ffn_down_shexp":
            return _ffn_down(file_type, default, layer, layout)
        case "ffn_gate" | "ffn_up" | "ffn_gate_exps" | "ffn_up_exps" | "ffn_gate_shexp" | "ffn_up_shexp":
            middle = not layout.early(layer) and layer < 7 * layout.layers // 8
            return T.IQ3_XXS if file_type == "IQ3_XS" and middle else default
        case _:
            return default


def _output(file_type: FileType, default: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    if columns % GGML_QUANT_SIZES[T.Q6_K][0]:
        return T.Q8_0
    if file_type in (*SMALLEST, "IQ3_XXS"):
        return T.Q5_K
    return T.Q8_0 if default == T.Q8_0 else T.Q6_K


def _embedding(file_type: FileType, default: GGMLQuantizationType) -> GGMLQuantizationType:
    if file_type in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
        return T.Q2_K
    return T.IQ3_S if file_type in ("IQ2_S", "IQ2_M", "IQ3_XXS") else default


def _below_three_bits(
    file_type: FileType, default: GGMLQuantizationType, name: str, role: str, layout: Layout
) -> GGMLQuantizationType:
    finer = T.IQ3_S if file_type in ("IQ2_S", "IQ2_M") else T.Q2_K
    if role in ("attn_v", "attn_qkv"):
        return T.Q4_K if layout.grouped or layout.experts >= GROUPED else finer
    if role == "attn_k" and layout.experts == 8:
        return T.Q4_K
    if role.startswith("ffn_down"):
        # llama.cpp counts tensors here, and layers everywhere else.
        return finer if layout.early(layout.downs.index(name)) else default
    if role == "attn_output":
        if layout.experts == 8:
            return T.Q5_K
        if file_type in ("IQ1_S", "IQ1_M"):
            return T.IQ2_XXS
        return T.IQ3_S if file_type in ("IQ2_S", "IQ2_M") else default
    return default


def _attention_value(
    file_type: FileType, default: GGMLQuantizationType, layer: int, layout: Layout
) -> GGMLQuantizationType:
    if layout.experts == 8:
        return T.Q8_0
    found = _dense_attention_value(file_type, default, layer, layout)
    big = layout.layers == BIG and layout.heads != layout.kv_heads
    return T.Q5_K if big and found in (T.Q3_K, T.Q4_K) else found


def _dense_attention_value(
    file_type: FileType, default: GGMLQuantizationType, layer: int, layout: Layout
) -> GGMLQuantizationType:
    match file_type:
        case "Q4_K_M" | "Q5_K_M":
            return T.Q6_K if layout.more_bits(layer) else default
        case "Q4_K_S":
            return T.Q5_K if layer < 4 else default
        case "Q3_K_L":
            return T.Q5_K
        case "Q3_K_M":
            return T.Q5_K if layer < 2 else T.Q4_K
        case "Q2_K":
            return T.Q4_K if layout.grouped else T.Q3_K
        case "IQ3_XXS" if not layout.grouped:
            return default if layout.imatrix else T.IQ3_S
        case "IQ3_XXS" | "IQ3_XS" | "IQ3_S" if layout.grouped:
            return T.Q4_K
        case "IQ3_M":
            return T.Q4_K
        case "IQ4_NL" | "IQ4_XS" if layout.grouped:
            return T.Q5_K
        case _:
            return default


def _attention_key(
    file_type: FileType, default: GGMLQuantizationType, role: str, layout: Layout
) -> GGMLQuantizationType:
    if role == "attn_k" and layout.experts == 8:
        return T.Q8_0
    return {"IQ3_XS": T.IQ3_XXS, "IQ3_XXS": T.IQ2_S}.get(file_type, default)


def _attention_output(file_type: FileType, default: GGMLQuantizationType, layout: Layout) -> GGMLQuantizationType:
    if layout.experts == 8:
        finer = (
            "Q2_K",
            "IQ3_XS",
            "IQ3_XXS",
            "Q3_K_S",
            "Q3_K_M",
            "IQ4_NL",
            "Q4_K_S",
            "Q4_K_M",
            "IQ3_S",
            "IQ3_M",
            "IQ4_XS",
        )
        return T.Q5_K if file_type in finer else default
    return {"Q2_K": T.Q3_K, "IQ3_XXS": T.IQ3_S, "Q3_K_M": T.Q4_K, "Q3_K_L": T.Q5_K, "IQ3_M": T.Q4_K}.get(
        file_type, default
    )


def _ffn_down(file_type: FileType, default: GGMLQuantizationType, layer: int, layout: Layout) -> GGMLQuantizationType:
    match file_type:
        case "Q4_K_M" | "Q5_K_M":
            return T.Q6_K if layout.more_bits(layer) else default
        case "Q4_K_S":
            return T.Q5_K if layout.early(layer) else default
        case "Q3_K_L":
            return T.Q5_K
        case "Q3_K_M":
            return T.Q5_K if layout.early(layer, 16) else T.Q4_K
        case "Q2_K":
            return T.Q3_K
        case "IQ3_XXS" if not layout.imatrix:
            return T.Q4_K if layout.early(layer) else T.Q3_K
        case "IQ3_M":
            finer = layout.early(layer) or (layout.experts == 8 and layout.more_bits(layer))
            return T.Q4_K if finer else default
        case "IQ4_NL" | "IQ4_XS":
            return T.Q5_K if layout.early(layer) and not layout.imatrix else default
        case "Q4_0" | "Q5_0" if layout.imatrix and layout.early(layer):
            return {"Q4_0": T.Q4_1, "Q5_0": T.Q5_1}[file_type]
        case _:
            return default
