"""The model card beside the files."""

from __future__ import annotations

from pathlib import Path

from luthier.api import Artifact, Facts


def write_card(folder: Path, model: Artifact, facts: Facts) -> None:
    """Write ``README.md``: what the files are, what was proven of them, and how to start them."""
    files: dict[str, Facts] = facts["files"]
    rows = [
        f"| {about['file']} | {about['bytes'] / 1e6:,.1f} MB | {about['kl']:.2g} | {about['top1']:.1%} |"
        for about in files.values()
    ]
    first = next(iter(files.values()))
    stops = ", ".join(f"`{token}`" for token in model.facts.get("stop_tokens", [])) or "none"
    last = list(files.values())[-1]["file"]
    imatrix = facts.get("imatrix")
    about = (
        f"\nQuantized with importances from {imatrix['tokens']:,} tokens (sha256 of the ids "
        f"`{imatrix['sha256'][:16]}`).\n"
        if imatrix
        else ""
    )
    if "base" in facts:
        start = f"llama-server -m BASE.gguf --lora {last} --jinja"
        about = f"\nAn adapter for the model `{facts['base'][:12]}`, checked on it.\n"
    else:
        start = f"llama-server -m {last} --jinja\nollama create my-model -f Modelfile"
    lines = f"""---
tags:
- gguf
- luthier
---

# {model.facts["architecture"]} as GGUF

Made by Luthier from the model `{model.key[:12]}`. Context: {facts["context_length"]:,} tokens. It stops at: {stops}.

| file | size | KL to the model, nats | same best token |
| --- | --- | --- | --- |
{chr(10).join(rows)}
{about}
Each file was loaded in llama.cpp and compared with the model in transformers (float32): {first["texts"]} texts became
the same tokens, the chat template (where there is one) gave the same prompts, each stop token ended the generation, and
the next-token distributions over the whole vocabulary at {first["positions"]} positions differ by what the table says.

## Start it

```sh
{start}
```
"""
    (folder / "README.md").write_text(lines, encoding="utf-8")
