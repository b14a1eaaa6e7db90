"""Runs in an environment with llama-cpp-python: quantizes a GGUF file as llama.cpp does.

python quantize.py SOURCE FOLDER [--imatrix FILE.npz] TYPE...
"""

from __future__ import annotations

import argparse
import ctypes

import numpy as np
from llama_cpp import llama_cpp as llama

options = argparse.ArgumentParser()
options.add_argument("source")
options.add_argument("folder")
options.add_argument("types", nargs="+")
options.add_argument("--imatrix")
given = options.parse_args()
for name in given.types:
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{name}")
    parameters.nthread = 2
    if given.imatrix:
        found = {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in np.load(given.imatrix).items()}
        entries = (llama.llama_model_imatrix_data * (len(found) + 1))()
        for entry, (key, value) in zip(entries, found.items(), strict=False):
            entry.name = key.encode()
            entry.data = value.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = value.size
        parameters.imatrix = entries
    out = f"{given.folder}/{name}.gguf"
    if llama.llama_model_quantize(given.source.encode(), out.encode(), ctypes.byref(parameters)):
        raise SystemExit(f"llama.cpp does not make {name}")
