"""One merge from beginning to end: open, check, plan, merge in a stream, check the result."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from luthier.api import Artifact, Facts, ModelError, StageContext, StoreError
from luthier.api.artifact import MANIFEST
from luthier.artifacts.digest import files_in
from luthier.artifacts.disk_space import check_disk_space
from luthier.artifacts.json_files import read_json, write_json
from luthier.artifacts.models import carry_licences, carry_text_files, model_facts
from luthier.artifacts.tensors import INDEX
from luthier.artifacts.texts import chat_template
from luthier.merging.api import MergeMethod
from luthier.merging.chat_template import TemplateChoice, template_choice_of, write_template_choice
from luthier.merging.check import (
    check,
    idle_filters,
    input_problems,
    odd_dtypes,
    refuse,
    unstackable,
    weights_that_cancel,
)
from luthier.merging.config import MergeConfig, as_method
from luthier.merging.engine import Engine, Settings
from luthier.merging.jobs import Extras
from luthier.merging.layout import Inputs, Layout, lay_out
from luthier.merging.lowrank import Unfoldable
from luthier.merging.pool import cores
from luthier.merging.reader import Source, Weights, full_of, label_of
from luthier.merging.verify import Verifier
from luthier.merging.vocabulary import Vocabulary, respell, tokens_of, vocabulary_of
from luthier.merging.writer import Output, size_of

NICENESS = 5


def merge_into(config: MergeConfig, context: StageContext, verifier: Verifier) -> Facts:
    """Merge into the context's folder and return the facts of the new model.

    Args:
        verifier: Looks at the result; it may still be starting.
    """
    method: MergeMethod[Any] = context.build(config.method)
    with ExitStack() as stack:
        artifacts = _artifacts(config, context)
        inputs = open_inputs(
            artifacts, _base(config, context), context, stack, partial(check, config), _own_bases(config, context)
        )
        left_out = sorted({name for model in inputs.all if isinstance(model, Weights) for name in model.left_out})
        draft = _drafted(config, inputs, context)
        inputs, vocabulary, layout = draft.inputs, draft.vocabulary, draft.layout
        _warn_of_suspicious_settings(config, inputs, layout, context)
        prepared = stack.enter_context(closing(Extras(method.prepare(artifacts))))
        own: dict[int | None, MergeMethod[Any]] = {
            place: context.build(use) for place, use in config.methods_of_slices().items()
        }
        jobs = [replace(job, extras=prepared.of(job.parameter.name), method=own.get(job.slice)) for job in layout.jobs]
        bare = [job.parameter.name for job in jobs if not job.extras and not job.copied]
        if as_method(config.method).prepares and bare:
            context.log(
                f"{len(bare)} of {len(jobs)} parameters are averaged: {config.method.name} finds nothing "
                f"about them in the data: {', '.join(bare[:5])}"
            )
        output = stack.enter_context(closing(Output(context.out, layout.tensors, config.shard_size)))
        engine = Engine(
            method,
            output,
            _settings(config, verifier),
            lambda done, total: context.progress(done // 1_000_000, total // 1_000_000, "M entries"),
        )
        engine.run(jobs)
        carry(inputs.lead.artifact, context.out)
        for other in inputs.all:
            carry_licences(full_of(other.artifact).path, context.out, other.label)
        if vocabulary is not None:
            vocabulary.write(context.out)
        tokens = None if vocabulary is None else tokens_of(vocabulary.tokenizer)
        special = write_template_choice(draft.template_choice, inputs, context, tokens)
        final = layout.config if vocabulary is None else vocabulary.settle(layout.config)
        write_json(context.out / "config.json", {**final, **special})
        proof = verifier.verdict(meanwhile=lambda: _settle(output, context))
    if layout.copied:
        context.log(f"copied as they are: {', '.join(layout.copied[:5])}")
    if left_out:
        context.log(
            f"{len(left_out)} tensors are not parameters and were left out (transformers computes or ties them): "
            f"{', '.join(left_out[:5])}"
        )
    return {
        **model_facts(context.out),
        "merged": len(layout.tensors) - len(layout.copied),
        "copied": layout.copied,
        "left_out": left_out,
        "method": config.method.name,
        "proof": proof,
        **({} if vocabulary is None else {"tokens_from": dict(Counter(vocabulary.sources.values()))}),
    }


@dataclass(frozen=True, slots=True)
class _Draft:
    """What is to be made, before a tensor is read.

    Attributes:
        inputs: The models, in the merged model's vocabulary.
        vocabulary: That vocabulary, where it is new.
        layout: The merged model's layout.
        template_choice: Its chat template, where it is not the lead's.
    """

    inputs: Inputs
    vocabulary: Vocabulary | None
    layout: Layout
    template_choice: TemplateChoice


def _drafted(config: MergeConfig, inputs: Inputs, context: StageContext) -> _Draft:
    """Plan the merge, from headers and configs alone.

    Raises:
        ModelError: with every reason why the models cannot be merged.
        StoreError: the disk has too little room, and nothing else is wrong.
    """
    stuck = list(unstackable(config, inputs))
    found = [*input_problems(config, inputs), *stuck]
    vocabulary: Vocabulary | None = None
    layout: Layout | None = None
    template_choice = TemplateChoice()
    full: StoreError | None = None
    try:
        vocabulary = _vocabulary(config, context, inputs)
        if vocabulary is not None:
            inputs = respell(inputs, vocabulary)
    except ModelError as error:
        found.append(error.message)
    try:
        # A tokenizer brings its own template along, unless another was chosen.
        brought = vocabulary is not None and chat_template(vocabulary.owner.artifact.path) is not None
        if config.chat_template is not None or not brought:
            template_choice = template_choice_of(config.chat_template, inputs)
    except ModelError as error:
        found.append(error.message)
    # Without the layers there is no layout; other problems do not prevent it.
    readable = not any(text for model in inputs.all for text in odd_dtypes(model))
    if readable and not stuck:
        layout = lay_out(config, inputs, context.seed, config.dtype)
        found += weights_that_cancel(config, layout.jobs)
        try:
            check_disk_space(context.out, size_of(layout.tensors), "the merged model")
        except StoreError as error:
            full = error
    if full is not None and not found:
        raise full
    refuse([*found, *([full.message] if full else [])], "merged")
    assert layout is not None, "refused otherwise"
    return _Draft(inputs, vocabulary, layout, template_choice)


def _warn_of_suspicious_settings(config: MergeConfig, inputs: Inputs, layout: Layout, context: StageContext) -> None:
    """Say what is right in some merges and a mistake in others."""
    if config.unused:
        context.warn(f"{config.method.name} does not use {', '.join(config.unused)}: left out")
    settings = [config.model_dump(mode="json", include={"weights", "slices"}), config.method.config.model_dump()]
    names = {*layout.tensors, *(name for job in layout.jobs for name in job.parameter.origins)}
    idle = idle_filters(settings, sorted(names))
    if idle:
        context.warn(f"no parameter's name contains {', '.join(map(repr, idle))}: such a filter does nothing")
    _warn_of_other_bases(config, inputs, context)


def _warn_of_other_bases(config: MergeConfig, inputs: Inputs, context: StageContext) -> None:
    """Warn where an adapter does not sit on the base: right for an adapter on a tuned model, else a mistake."""
    slices = [place for place, part in enumerate(config.slices) for _ in part.sources] or [None] * len(inputs.models)
    for model, base in dict.fromkeys(zip(inputs.models, map(inputs.base_of, slices), strict=True)):
        under = full_of(model.artifact)
        if base is not None and model.artifact.kind == "adapter" and under.key != full_of(base.artifact).key:
            context.warn(
                f"{model.label} sits on {label_of(under)}, not on the base {base.label}: what counts as its "
                "change is the difference of the two as well"
            )


def _settle(output: Output, context: StageContext) -> None:
    """See the files onto the disk and hash them, all at once and while the other process checks them."""
    with ThreadPoolExecutor() as pool:
        synced = pool.submit(output.sync)
        for _ in pool.map(context.finished, output.paths):
            pass
        synced.result()


def _vocabulary(config: MergeConfig, context: StageContext, inputs: Inputs) -> Vocabulary | None:
    """The new vocabulary, when the models' own one does not stay."""
    multiple = config.pad_to_multiple_of or 1
    if config.tokenizer == "base" and not config.tokens and multiple == 1:
        return None
    shared = config.tokenizer in ("base", "union")
    owner = inputs.lead if shared else _merged_as("tokenizer", context.artifact(config.tokenizer), inputs)
    tokens = [
        (rows, _merged_as("tokens", context.artifact(rows.model), inputs) if rows.model else None)
        for rows in config.tokens
    ]
    return vocabulary_of(inputs, owner, joined=config.tokenizer == "union", tokens=tokens, multiple=multiple)


def _merged_as(key: str, wanted: Artifact, inputs: Inputs) -> Source:
    """The model among those that are merged that a key names."""
    found = next((model for model in inputs.all if model.artifact.key == wanted.key), None)
    if found is None:
        raise ModelError(f"`{key}` names {wanted.manifest.get('stage')}, which is not merged: name one of the models")
    return found


def _artifacts(config: MergeConfig, context: StageContext) -> list[Artifact]:
    """The models in the order in which layers or weights name them."""
    if not config.slices:
        return context.artifacts(config.models)
    return [context.artifact(source.model) for part in config.slices for source in part.sources]


def _base(config: MergeConfig, context: StageContext) -> Artifact | None:
    return context.artifact(config.base) if config.base else None


def _own_bases(config: MergeConfig, context: StageContext) -> dict[int, Artifact]:
    """The bases of the slices that have their own."""
    return {place: context.artifact(part.base) for place, part in enumerate(config.slices) if part.base}


def open_inputs(
    artifacts: Sequence[Artifact],
    base: Artifact | None,
    context: StageContext,
    stack: ExitStack,
    check: Callable[[Inputs], None] = lambda inputs: None,
    own_bases: Mapping[int, Artifact] | None = None,
) -> Inputs:
    """Open every model once; an adapter that cannot be added on the way is folded by PEFT.

    Args:
        artifacts: The models and adapters.
        base: The base, where there is one.
        context: Where to fold, and where warnings go.
        stack: Closes them.
        check: Refuses what does not fit before anything is folded, which takes time and space; adapters that will be
            count as their bases for it.
        own_bases: The bases of slices that have another one, by their place.
    """
    others = dict(own_bases or {})
    opened: dict[str, Weights] = {}
    reasons: dict[str, str] = {}
    for artifact in [*artifacts, *([base] if base else []), *others.values()]:
        if artifact.key in opened:
            continue
        try:
            opened[artifact.key] = Weights(artifact)
        except Unfoldable as reason:
            reasons[artifact.key] = str(reason)
            opened[artifact.key] = Weights(artifact, full_of(artifact).path)
        stack.callback(opened[artifact.key].close)

    def inputs() -> Inputs:
        return Inputs(
            [opened[artifact.key] for artifact in artifacts],
            opened[base.key] if base else None,
            {place: opened[artifact.key] for place, artifact in others.items()},
        )

    if reasons:
        check(inputs())
    for key, reason in reasons.items():
        artifact = opened[key].artifact
        opened[key] = Weights(artifact, _folded(artifact, reason, context))
        stack.callback(opened[key].close)
    return inputs()


def _folded(artifact: Artifact, reason: str, context: StageContext) -> Path:
    """A folder with an adapter folded by PEFT, for a `reason`."""
    from luthier.modeling.loading import folded_by_peft

    if "quantization_config" in read_json(artifact.base.path / "config.json"):
        raise ModelError(
            f"the adapter {label_of(artifact)} sits on quantized weights",
            where=str(artifact.base.path),
            hint="name the full-precision model: <model>+<adapter>",
        )
    context.log(f"folding {label_of(artifact)} with PEFT: it has {reason}")
    return folded_by_peft(artifact, context.scratch / f"folded-{artifact.key[:16]}")


def _settings(config: MergeConfig, verifier: Verifier) -> Settings:
    workers = config.workers or cores()
    # The other process has the longer way to go, when the model is small: it goes first where there are few cores.
    niceness = NICENESS if verifier.apart else 0
    return Settings(workers, config.chunk, config.memory, niceness=niceness)


def carry(model: Artifact, out: Path) -> None:
    """Everything but weights: from the full model, then the text files from the model itself."""
    full = full_of(model).path
    for path in files_in(full):
        weights = path.suffix == ".safetensors" or path.name in (MANIFEST, INDEX)
        if path.parent == full and not weights:
            shutil.copyfile(path, out / path.name)
    carry_text_files(model.path, out)
