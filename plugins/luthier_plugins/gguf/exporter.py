"""The exporter ``gguf``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

from luthier.api import Artifact, DataError, Exporter, Facts, ModelError, StageContext
from luthier.artifacts.datasets import read_split
from luthier.artifacts.disk_space import check_disk_space
from luthier.artifacts.json_files import read_json
from luthier.artifacts.models import carry_licences
from luthier.artifacts.rows import conversations
from luthier.merging.folding import full_weights
from luthier.modeling.calibration import blocks_of, digest_of, texts_of, tuned_on
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.golden import LIMIT, conversations_of, entries_of
from luthier.modeling.loading import load_tokenizer
from luthier.modeling.quantizing import refuse_quantized
from luthier.modeling.streamed import Streamed
from luthier.serving.bundle import write_bundle
from luthier_plugins.gguf.card import write_card
from luthier_plugins.gguf.check import Expected, UnlikeError, check, expected_of
from luthier_plugins.gguf.config import LARGEST_KL, FileType, GgufConfig
from luthier_plugins.gguf.guard import guarded
from luthier_plugins.gguf.imatrix import importances_of
from luthier_plugins.gguf.lora import write_lora
from luthier_plugins.gguf.modelfile import write_modelfile
from luthier_plugins.gguf.server import LlamaServer
from luthier_plugins.gguf.tokenizer import forms_in, spaced_in
from luthier_plugins.gguf.write import Source

ARCHITECTURES = "gguf_architectures"
CHECK_CONTEXT = 512
SERVED_CONTEXT = 4096
OWN_TEXTS = 50
"""Texts of the recipe's own that have to become the same tokens."""
EXACT: dict[str, FileType] = {"BF16": "BF16", "F16": "F16"}
"""The type of a file in which weights of a dtype are what they are."""
ANSWERED, ANSWERED_TOKENS = 4, 256
"""Conversations of the recipe's own behind whose answers the file has to stop where the model does, and how long they
may be."""
CALIBRATION_TOKENS = 16_384
BLOCK = 512
"""Tokens that the model is shown at once."""


class Gguf(Exporter[GgufConfig]):
    """Writes GGUF files and proves each of them in llama.cpp."""

    serves: ClassVar[bool] = True

    def export(self, model: Artifact) -> Facts:
        context = self.context
        refuse_quantized(model, "written as GGUF, which has types of its own")
        if self.config.adapter:
            return self._export_adapter(model)
        weights = full_weights(model, context.scratch / "folded")
        if self.config.converter is not None:
            return self._convert(model, weights)
        architectures = context.collected(ARCHITECTURES)
        with ExitStack() as stack:
            source = Source(weights, stack, architectures)
            source.override(self.config.overrides)
            check_disk_space(
                context.out, sum(map(source.bytes, self.config.types)), f"{len(self.config.types)} GGUF files"
            )
            for file_type in self.config.types:
                _warn_of_fallbacks(source, file_type, context)
            tokenizer, data = load_tokenizer(model), self._data(model)
            blocks = self._blocks(tokenizer, data) if self.config.wants_imatrix else []
            reference = Streamed(weights)
            facts: Facts = {"imatrix": _weigh(source, reference, blocks, context)} if blocks else {}
            expected = expected_of(
                reference,
                tokenizer,
                model.facts["stop_token_ids"],
                _own(data, tokenizer),
                spaced=source.tokenizer.spaced,
                forms=source.tokenizer.forms,
                length=source.context_length,
                answered=_answered(data, tokenizer, model.facts["stop_token_ids"]),
            )
            for remark in source.tokenizer.remarks:
                context.warn(remark)
            if not source.tokenizer.spaced:
                context.warn(
                    "llama.cpp puts a space in front of a text that begins with one already, this tokenizer "
                    "does not: such texts begin with another token"
                )
            files: dict[str, Facts] = {}
            for file_type in self.config.types:
                path = context.scratch / f"model-{file_type}.gguf"
                for done in source.write(path, file_type, model.key[:12]):
                    context.progress(done, len(source.parts), f"tensors of {file_type}")
                try:
                    verdict = _proven(path, expected, self.config.largest_kl(file_type), context)
                except UnlikeError as error:
                    raise self._explained(error, file_type, source, expected) from error
                files[file_type] = {
                    **verdict,
                    "tensors": source.mix(file_type),
                    "fallbacks": source.fallbacks(file_type),
                }
            facts |= {
                "files": files,
                "context_length": source.context_length,
                "stop_token_ids": model.facts["stop_token_ids"],
            }
        return self._finish(model, tokenizer, data, facts)

    def _data(self, model: Artifact) -> list[Artifact]:
        """The calibration data: what is named, or what the model was tuned on."""
        return self.context.artifacts([self.config.calibration]) if self.config.calibration else tuned_on(model)

    def _blocks(self, tokenizer: Any, data: Sequence[Artifact]) -> list[list[int]]:
        """What the importances are computed on.

        Raises:
            ModelError: there is nothing, or less than asked for.
        """
        if not data:
            raise ModelError(
                "there is no data to compute importances on: the model was not tuned in this store",
                hint="name a dataset as `calibration`",
            )
        wanted = self.config.calibration_tokens
        return blocks_of(
            texts_of(data, tokenizer), tokenizer, wanted or CALIBRATION_TOKENS, BLOCK, exactly=wanted is not None
        )

    def _export_adapter(self, model: Artifact) -> Facts:
        """Write the adapter alone, and check it on its base in llama.cpp."""
        context = self.context
        if model.kind != "adapter":
            raise ModelError("`adapter: true` writes an adapter alone, and this is a full model", hint="leave it out")
        tokenizer, stops = load_tokenizer(model), model.facts["stop_token_ids"]
        path, base = context.scratch / "adapter.gguf", context.scratch / "base-F16.gguf"
        with ExitStack() as stack:
            source = Source(model.base.path, stack, context.collected(ARCHITECTURES))
            count = write_lora(path, source, model)
            for done in source.write(base, "F16", model.base.key[:12]):
                context.progress(done, len(source.parts), "tensors of the base")
        data = self._data(model)
        expected = expected_of(
            Streamed(full_weights(model, context.scratch / "folded")),
            tokenizer,
            stops,
            _own(data, tokenizer),
            spaced=source.tokenizer.spaced,
            forms=source.tokenizer.forms,
            length=source.context_length,
            answered=_answered(data, tokenizer, stops),
        )
        with LlamaServer(
            base, context_length=max(CHECK_CONTEXT, expected.longest + 1), lora=path, exact=True
        ) as server:
            verdict = _checked(server, expected, self.config.largest_kl("F16"), "was it trained on this model?")
        base.unlink()
        path.rename(context.out / path.name)
        size = (context.out / path.name).stat().st_size
        context.log(f"{path.name}: {count} weights, {size / 1e6:.1f} MB, KL {verdict['kl']:.2g} nats")
        files: dict[str, Facts] = {"LoRA": {"file": path.name, "bytes": size, "weights": count, **verdict}}
        carry_licences(model.path, context.out)
        facts: Facts = {
            "files": files,
            "context_length": source.context_length,
            "stop_token_ids": stops,
            "base": model.base.key,
        }
        write_card(context.out, model, facts)
        return facts

    def _convert(self, model: Artifact, weights: Path) -> Facts:
        """Have a script of the user's convert the model, and check what it wrote."""
        context = self.context
        script, path = context.path(str(self.config.converter)), context.scratch / "model-F16.gguf"
        command = [sys.executable, str(script), str(weights), "--outfile", str(path), "--outtype", "f16"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        context.log(done.stdout + done.stderr)
        if done.returncode or not path.exists():
            last = (done.stderr.strip() or done.stdout.strip() or "it wrote no file").splitlines()[-1]
            raise ModelError(
                f"the converter ended with exit code {done.returncode}: {last}",
                where=str(script),
                hint="its full output is in the run's log",
            )
        tokenizer, stops = load_tokenizer(model), model.facts["stop_token_ids"]
        data = self._data(model)
        expected = expected_of(
            Streamed(weights),
            tokenizer,
            stops,
            _own(data, tokenizer),
            spaced=spaced_in(weights),
            forms=forms_in(weights),
            answered=_answered(data, tokenizer, stops),
        )
        files: dict[str, Facts] = {"F16": _written(path, expected, self.config.largest_kl("F16"), script.name, context)}
        length = read_json(weights / "config.json").get("max_position_embeddings") or CHECK_CONTEXT
        facts: Facts = {"files": files, "context_length": length, "stop_token_ids": stops, "converter": script.name}
        return self._finish(model, tokenizer, data, facts)

    def _explained(self, error: UnlikeError, file_type: FileType, source: Source, expected: Expected) -> ModelError:
        """Why a file is unlike the model: only where a file without rounding is like it, a finer type is a way out."""
        exact = EXACT.get(source.dtype, "F32")
        if file_type not in (exact, "F32"):
            path = self.context.scratch / f"model-{exact}.gguf"
            for done in source.write(path, exact, "exact"):
                self.context.progress(done, len(source.parts), f"tensors of {exact}, to find out why")
            try:
                with LlamaServer(path, context_length=max(CHECK_CONTEXT, expected.longest + 1), exact=True) as server:
                    check(server, expected, max(self.config.largest_kl(file_type), LARGEST_KL[exact]))
                return error
            except UnlikeError as same:
                error = same
            finally:
                path.unlink()
        return ModelError(
            f"{error.message}; a file in which nothing is rounded ({exact}) is no better: llama.cpp computes the model "
            "otherwise",
            where=error.where,
            hint="is there something unusual in config.json, such as rotary settings? serve it from the exporter "
            "`hf`, or name llama.cpp's own script as `converter`",
        )

    def _finish(self, model: Artifact, tokenizer: Any, data: Sequence[Artifact], facts: Facts) -> Facts:
        """Write what accompanies the files."""
        context = self.context
        files: dict[str, Facts] = facts["files"]
        length: int = facts["context_length"]
        if self.config.serve:
            last = list(files.values())[-1]["file"]
            room = min(length, SERVED_CONTEXT)
            with LlamaServer(context.out / last, context_length=room) as server:
                entries = entries_of(tokenizer, conversations_of(data), server, room)
            facts["serve"] = write_bundle(context.out, self.config.serve, last, length, entries, LIMIT)
        carry_licences(model.path, context.out)
        write_modelfile(context.out, files, tokenizer, model.facts, length)
        write_card(context.out, model, facts)
        return facts

    def open(self, export: Artifact, variant: str | None) -> LlamaServer:
        path, length = _file_of(export, variant), export.facts["context_length"]
        # A model made for very long contexts need not pay for all of it to answer short prompts.
        return LlamaServer(path, context_length=min(length, SERVED_CONTEXT))

    @contextmanager
    def listen(self, export: Artifact, variant: str | None, port: int) -> Generator[str]:
        """llama.cpp's own server with a file of an export; gives its address."""
        path, length = _file_of(export, variant), export.facts["context_length"]
        with (
            LlamaServer(path, context_length=min(length, SERVED_CONTEXT)) as server,
            guarded(server.url, port, server.obeys) as url,
        ):
            yield url


def _weigh(source: Source, model: Streamed, blocks: Sequence[Sequence[int]], context: StageContext) -> Facts:
    """Compute the importances, and have the source quantize with them."""
    importances, idle = importances_of(
        model, source.parts, blocks, lambda done, total: context.progress(done, total, "texts for the importances")
    )
    if not importances:
        raise ModelError(
            "none of the model's layers could be watched: there are no importances", hint="leave `imatrix` out"
        )
    if idle:
        context.warn(
            f"no token of the calibration data reached {idle} of the experts of a layer: "
            "name more data, or data of more kinds"
        )
    source.weigh(importances)
    return {**digest_of(blocks), "tensors": len(importances)}


def _own(data: Sequence[Artifact], tokenizer: Any) -> list[str]:
    """Some texts of the recipe's own, those that it tests with first."""
    texts = chain(islice(texts_of(data, tokenizer, "test"), OWN_TEXTS // 2), texts_of(data, tokenizer))
    return list(islice(texts, OWN_TEXTS))


def _answered(data: Sequence[Artifact], tokenizer: Any, stops: Sequence[int]) -> list[list[int]]:
    """Some conversations of the recipe's own that are short, as tokens up to the one that ends the last answer."""
    if tokenizer.chat_template is None or not stops:
        return []
    encoder = ChatEncoder(tokenizer, stops)
    rows = islice((row for item in data for row in read_split(item, "train")), OWN_TEXTS)
    found: list[list[int]] = []
    for conversation in (messages for row in rows for messages in conversations(row)[:1]):
        try:
            ids = encoder.answer(conversation).input_ids
        except DataError:
            # What a template refuses, or does not end, was not trained either.
            continue
        if ids[-1] in stops and len(ids) <= ANSWERED_TOKENS:
            found.append(ids[:-1])
        if len(found) == ANSWERED:
            break
    return found


def _warn_of_fallbacks(source: Source, file_type: FileType, context: StageContext) -> None:
    found = source.fallbacks(file_type)
    if found:
        some = ", ".join(f"{name} is {kind}" for name, kind in list(found.items())[:3])
        context.warn(
            f"{file_type}: the rows of {len(found)} tensors are not a multiple of 256, so they get larger "
            f"types ({some}{', ...' if len(found) > 3 else ''}); the manifest names them all"
        )


def _proven(path: Path, expected: Any, limit: float, context: StageContext) -> Facts:
    """Check a file in llama.cpp; only then is it put where a user would take it for good."""
    with LlamaServer(path, context_length=max(CHECK_CONTEXT, expected.longest + 1), exact=True) as server:
        verdict = check(server, expected, limit)
    size = path.stat().st_size
    path.rename(context.out / path.name)
    context.log(f"{path.name}: {size / 1e6:.1f} MB, KL {verdict['kl']:.2g} nats, same best token {verdict['top1']:.0%}")
    return {"file": path.name, "bytes": size, **verdict, "largest_kl": limit}


def _written(path: Path, expected: Expected, limit: float, script: str, context: StageContext) -> Facts:
    """Check what a converter script wrote."""
    try:
        return _proven(path, expected, limit, context)
    except UnlikeError as error:
        raise ModelError(error.message, where=error.where, hint=f"{script} does not write what the model is") from error


def _checked(server: LlamaServer, expected: Expected, limit: float, hint: str) -> Facts:
    """Check what is not rounded, so that nothing finer would help."""
    try:
        return check(server, expected, limit)
    except UnlikeError as error:
        raise ModelError(error.message, where=error.where, hint=hint) from error


def _file_of(export: Artifact, variant: str | None) -> Path:
    files: dict[str, Facts] = export.facts["files"]
    if "LoRA" in files:
        raise ModelError(
            "this export is an adapter alone: it answers on its base only",
            where=str(export.path),
            hint="llama-server -m BASE.gguf --lora adapter.gguf",
        )
    chosen = variant or list(files)[-1]
    if chosen not in files:
        raise ModelError(f"the export has no {chosen}", where=str(export.path), hint=f"it has: {', '.join(files)}")
    return export.path / files[chosen]["file"]
