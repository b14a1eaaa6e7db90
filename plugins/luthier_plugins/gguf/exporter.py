"""The exporter ``gguf``."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from luthier.api import Artifact, Facts, ModelError, StageContext, Teacher
from luthier.train.loading import full_weights, load_model, load_tokenizer
from luthier_plugins.gguf.check import check, expected_of
from luthier_plugins.gguf.config import LARGEST_KL, GgufConfig
from luthier_plugins.gguf.server import LlamaServer
from luthier_plugins.gguf.write import Source

CHECK_CONTEXT = 512


class Gguf:
    """Writes GGUF files and proves each of them in llama.cpp."""

    def __init__(self, config: GgufConfig) -> None:
        self.config = config

    def export(self, model: Artifact, context: StageContext) -> Facts:
        weights = full_weights(model, context.work / "folded")
        files: dict[str, Facts] = {}
        with ExitStack() as stack:
            source = Source(weights, stack)
            expected = expected_of(load_model(model), load_tokenizer(model), model.facts["stop_token_ids"])
            for file_type in self.config.types:
                path = context.out / f"model-{file_type}.gguf"
                for done in source.write(path, file_type, f"{model.facts['architecture']} {model.key[:12]}"):
                    context.progress(done, len(source.parts), f"tensors of {file_type}")
                limit = self.config.max_kl or LARGEST_KL[file_type]
                with LlamaServer(path, context_length=CHECK_CONTEXT) as server:
                    verdict = check(server, expected, limit)
                size = path.stat().st_size
                files[file_type] = {"file": path.name, "bytes": size, "tensors": source.mix(file_type), **verdict}
                context.log(
                    f"{path.name}: {size / 1e6:.1f} MB, KL {verdict['kl']:.2g} nats, "
                    f"same best token {verdict['top1']:.0%}"
                )
            length = source.config["max_position_embeddings"]
        return {"files": files, "context_length": length, "stop_token_ids": model.facts["stop_token_ids"]}

    def serve(self, export: Artifact, variant: str | None, limit: int) -> AbstractContextManager[Teacher]:
        path, length = _file_of(export, variant), export.facts["context_length"]
        # A model made for very long contexts need not pay for all of it to answer short prompts.
        return LlamaServer(path, context_length=min(length, 4096), limit=limit)


def _file_of(export: Artifact, variant: str | None) -> Path:
    files: dict[str, Facts] = export.facts["files"]
    chosen = variant or list(files)[-1]
    if chosen not in files:
        raise ModelError(f"the export has no {chosen}", where=str(export.path), hint=f"it has: {', '.join(files)}")
    return export.path / files[chosen]["file"]
