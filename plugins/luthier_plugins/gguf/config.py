"""The config of the exporter ``gguf``."""

from __future__ import annotations

from typing import Literal

from luthier.api import Config, DatasetInput, Field, FileSource, Pattern
from pydantic import field_validator, model_validator

FileType = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0",
    "IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_S",
    "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
]  # fmt: skip
TensorType = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K",
    "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
]  # fmt: skip
NEED_IMATRIX: tuple[FileType, ...] = ("IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
"""Files that have tensors so coarse that llama.cpp refuses to make them without importances."""

LARGEST_KL: dict[FileType, float] = {
    "F32": 1e-4, "F16": 1e-4, "BF16": 1e-3, "Q8_0": 1e-3, "Q6_K": 0.005, "Q5_K_M": 0.01, "Q5_K_S": 0.012,
    "Q5_1": 0.012, "Q5_0": 0.015, "Q4_K_M": 0.02, "Q4_K_S": 0.03, "Q4_1": 0.04, "Q4_0": 0.05, "IQ4_NL": 0.04,
    "IQ4_XS": 0.04, "Q3_K_L": 0.06, "Q3_K_M": 0.08, "Q3_K_S": 0.15, "IQ3_M": 0.12, "IQ3_S": 0.15, "IQ3_XS": 0.15,
    "IQ3_XXS": 0.25, "Q2_K": 0.3, "IQ2_M": 0.4, "IQ2_S": 0.5, "IQ2_XS": 0.6, "IQ2_XXS": 0.8, "IQ1_M": 1.5, "IQ1_S": 2.0,
}  # fmt: skip
"""The largest mean KL divergence to the model, in nats per token, that a file may have: the gate of each type."""


class LlamaConfig(Config):
    """A GGUF file in llama.cpp, in the worker's own process."""

    path: FileSource
    """The GGUF file."""
    context_length: int = Field(default=4096, gt=0)
    """The longest request and answer together, in tokens."""


class GgufConfig(Config):
    """One GGUF file per type, each loaded and compared in llama.cpp."""

    types: list[FileType] = Field(default=["F16"], min_length=1)
    """The types of the weights, named as llama.cpp names them."""
    overrides: dict[Pattern, TensorType] = {}
    """Types of single tensors: by a regular expression for names in GGUF, such as ``attn_v: Q8_0``; the first that is
    found in a name counts."""
    imatrix: bool | None = None
    """Whether to choose what is rounded away by how much it matters on the calibration data; by default only where a
    type cannot do without."""
    calibration: DatasetInput | None = None
    """What the importances are computed on, and text that llama.cpp has to read alike; by default the data that the
    model was tuned on."""
    calibration_tokens: int | None = Field(default=None, gt=0)
    """How many tokens of it; by default 16,384, or as many as there are."""
    max_kl: float | dict[FileType, float] | None = None
    """The largest mean KL divergence to the model it came from, in nats per token, for all files or by type; by
    default from 0.0001 for F16 over 0.02 for Q4_K_M to 2 for IQ1_S."""
    adapter: bool = False
    """Write an adapter alone, as a LoRA file that llama.cpp adds to its base; it is checked on the base's F16 file."""
    converter: FileSource | None = None
    """For architectures that Luthier does not know: a converter script such as llama.cpp's ``convert_hf_to_gguf.py``,
    run as ``python SCRIPT MODEL --outfile FILE --outtype f16``; what it writes is checked like any other file."""

    serve: list[Literal["llama.cpp", "ollama"]] = []
    """For each of these programs: the command that starts it, a compose file, and a golden file with a script that
    checks a running server against it; for the last of the files."""

    @field_validator("types")
    @classmethod
    def _types_differ(cls, value: list[FileType]) -> list[FileType]:
        twice = sorted({name for name in value if value.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]} stands twice")
        return value

    @model_validator(mode="after")
    def _adapters_have_no_types(self) -> GgufConfig:
        if self.adapter and (self.types != ["F16"] or self.overrides or self.imatrix or self.serve or self.converter):
            raise ValueError("an adapter is written in one way only: leave the other settings out")
        return self

    @model_validator(mode="after")
    def _small_types_have_importances(self) -> GgufConfig:
        small = [name for name in self.types if name in NEED_IMATRIX]
        if small and self.imatrix is False:
            raise ValueError(f"{small[0]} needs importances: leave `imatrix: false` out")
        return self

    @model_validator(mode="after")
    def _a_converter_does_as_it_likes(self) -> GgufConfig:
        if self.converter is not None and (self.types != ["F16"] or self.overrides or self.imatrix):
            raise ValueError("a converter script writes F16 only: leave `types`, `overrides` and `imatrix` out")
        return self

    def largest_kl(self, file_type: FileType) -> float:
        """What the file's KL divergence may be at most."""
        given = self.max_kl.get(file_type) if isinstance(self.max_kl, dict) else self.max_kl
        return LARGEST_KL[file_type] if given is None else given

    @property
    def wants_imatrix(self) -> bool:
        """Whether importances are computed."""
        if self.imatrix is not None:
            return self.imatrix
        return any(name in NEED_IMATRIX for name in self.types)
