"""Trains a model on rows: from the proof that shortcuts compute what the model says, to the last step."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import EarlyStoppingCallback, PrinterCallback

from luthier.api.context import StageContext
from luthier.api.errors import Interrupted, ModelError
from luthier.api.stages import Facts
from luthier.api.training import Objective, Optimizer, Regularizer, Schedule, TokenBatch
from luthier.api.tuning import TrainingConfig
from luthier.artifacts.checkpoints import checkpoints
from luthier.artifacts.digest import digest_value
from luthier.modeling.precision import Precision
from luthier.training.arguments import arguments_of
from luthier.training.batches import draws
from luthier.training.encoding import EncodedRow
from luthier.training.experts import decay_rows
from luthier.training.layout import Layout
from luthier.training.memory import fits, limits_of, measure_limits
from luthier.training.mismatched import Mismatched, WithMismatched
from luthier.training.mixing import Mix
from luthier.training.offload import offloaded
from luthier.training.passes import Passes
from luthier.training.proof import Proof
from luthier.training.receipt import LISTED, Receipt
from luthier.training.references import with_reference
from luthier.training.reporter import Reporter
from luthier.training.segments import leave_segments, use_segments
from luthier.training.trainer import ObjectiveTrainer, Words


@dataclass(frozen=True, slots=True)
class Trained:
    """How training went.

    Attributes:
        facts: ``steps``, and the loss of the first and of the last: ``loss_first`` and ``loss_last``.
        held_out: Computes the loss of the held-out rows with the weights as they are when it is called; None where
            there are none.
    """

    facts: Facts
    held_out: Callable[[], float] | None


@dataclass(frozen=True, slots=True)
class Material:
    """What is trained on.

    Attributes:
        train: The rows.
        validation: Rows that are looked at while it trains; there may be none.
        padding: The id of the padding token.
        key: Identifies rows and model: the same reference belongs to it.
        scale: By what the learning rate of a parameter is multiplied, by its name.
        mix: Which rows an epoch takes; by default all.
        describe: Gives the beginning of a row, as text.
    """

    train: Sequence[EncodedRow]
    validation: Sequence[EncodedRow]
    padding: int
    key: str
    scale: Callable[[str], float] = lambda name: 1.0
    mix: Mix | None = None
    describe: Callable[[EncodedRow], str] = lambda row: f"{len(row)} tokens"

    @property
    def taken(self) -> Mix:
        """Which rows an epoch takes."""
        return self.mix or Mix.of([len(self.train)], None)


def train(
    model: Any, material: Material, config: TrainingConfig, context: StageContext, precision: Precision = "fp32"
) -> Trained:
    """Train a model on encoded rows, on the device that it is on, from the last checkpoint when there is one.

    Raises:
        Interrupted: the user asked to stop; a checkpoint is written.
        ModelError: a loss is not finite, or the reference is not the model.
    """
    # No progress bars of other libraries: events report the progress.
    transformers.utils.logging.disable_progress_bar()
    objective: Objective[Any] = context.build(config.objective)
    compared = "reference" in objective.needs
    if compared:
        _without_dropout(model, context)
    regularizers: list[Regularizer[Any]] = [context.build(use) for use in config.regularizers]
    passes = _passes_of(model, material, objective, regularizers, config, context, precision)
    prove(passes, material.train, precision, context, steady=compared)
    rows, validation = material.train, material.validation
    arguments = arguments_of(config, context, steps_of(config, len(material.taken)), evaluates=bool(len(validation)))
    if compared:
        needed = _needed(material.taken, config.batch_size * arguments.max_steps, arguments.seed)
        mismatched = config.max_length if "mismatched" in objective.needs else None
        key = digest_value([material.key, "train", needed.tolist()])
        rows = _referenced(rows, needed, passes, key, context, mismatched)
        if len(validation):
            everything = np.arange(len(validation))
            key = digest_value([material.key, "validation"])
            validation = _referenced(validation, everything, passes, key, context, mismatched)
    optimizer: Optimizer[Any] = context.build(config.optimizer)
    made = optimizer.make(model, schedule_of(config, arguments.max_steps, material.scale))
    decay_rows(model, made[0], config.weight_decay)
    receipt = Receipt(model, context.scratch)
    words = Words(material.describe, context.warn, config.on_divergence == "stop")
    trainer = ObjectiveTrainer(model, arguments, rows, validation, passes, made, receipt, material.taken, words)
    if getattr(model.config, "output_router_logits", False) and passes.limits.rows is not None:
        context.warn("the loss that balances experts is that of each micro-batch: `micro_batch_size` changes it")

    def batches() -> Iterator[TokenBatch]:
        for first in range(0, len(rows), config.batch_size):
            yield from passes.batches(rows[first : first + config.batch_size])

    for regularizer in regularizers:
        regularizer.start(model, batches)
    if context.device != "cpu" and config.micro_batch_size == "auto":
        measure_limits(passes, rows)
        context.log(f"a pass takes {passes.limits.tokens} tokens")
    return _run(trainer, receipt, config, context)


def _passes_of(
    model: Any,
    material: Material,
    objective: Objective[Any],
    regularizers: Sequence[Regularizer[Any]],
    config: TrainingConfig,
    context: StageContext,
    precision: Precision,
) -> Passes:
    """How steps are computed, as far as the config and the machine say it.

    Raises:
        ModelError: the config wants what takes a GPU, and there is none.
    """
    device = torch.device(context.device)
    if config.activation_offload and device.type == "cpu":
        raise ModelError(
            "`activation_offload` moves activations from a GPU into the computer's memory, and there is no GPU",
            hint="leave it out; `gradient_checkpointing: true` needs less memory everywhere",
        )

    @contextmanager
    def around() -> Iterator[None]:
        # Nothing is kept where there are no gradients.
        moved = config.activation_offload and torch.is_grad_enabled()
        halves = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
        with halves, offloaded(model) if moved else nullcontext():
            yield

    limits = limits_of(config, model, context, precision)
    passes = Passes(model, Layout(material.padding), limits, objective, regularizers, around)
    passes.may_save_memory = config.gradient_checkpointing == "auto"
    longest = longest_of(material.train)
    if config.gradient_checkpointing is True or (
        passes.may_save_memory and not fits(model, longest, context, precision)
    ):
        passes.save_memory()
        context.log("activations are computed twice instead of kept (`gradient_checkpointing`)")
    return passes


def steps_of(config: TrainingConfig, rows: int) -> int:
    """How many optimizer steps a stage takes; the last of an epoch may have fewer rows."""
    return config.steps or math.ceil((config.epochs or 1) * math.ceil(rows / config.batch_size))


def schedule_of(config: TrainingConfig, steps: int, scale: Callable[[str], float]) -> Schedule:
    """What a stage's config says of so many steps."""
    return Schedule(
        steps=steps,
        warmup_steps=math.ceil(steps * config.warmup),
        learning_rate=config.learning_rate,
        shape=config.schedule,
        weight_decay=config.weight_decay,
        decay_steps=math.ceil(steps * config.decay),
        scale=scale,
    )


def prove(
    passes: Passes, rows: Sequence[EncodedRow], precision: Precision, context: StageContext, *, steady: bool
) -> None:
    """Before the first step: give up the shortcuts that do not compute what the model does, and say so.

    Args:
        passes: How steps are computed; what does not hold is taken out of it.
        rows: The training rows.
        precision: That of the passes.
        context: Is told.
        steady: Whether the model has to say the same while it is trained: it is compared with a reference.

    Raises:
        ModelError: the model's log-probabilities are not finite, or the reference is another model.
    """
    model = passes.model
    halves = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in model.parameters())

    def around() -> AbstractContextManager[Any]:
        # Without gradients autocast would keep copies of weights that are trained later.
        device = next(model.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, cache_enabled=False) if precision == "bf16" else nullcontext()

    proof = Proof(model, rows, passes.layout.padding, "bf16" if halves else precision, around)
    if distance := proof.apart(fused=True):
        passes.fused = False
        context.warn(
            "the output head on trained positions alone gives log-probabilities that differ from the model's own "
            f"by {distance:.3g}: all its logits are computed instead, which takes more memory"
        )
    if not passes.fused and (distance := proof.apart(fused=False)):
        raise ModelError(f"padded rows change the model's log-probabilities, by {distance:.3g}")
    if proof.sequences > 1 and use_segments(model):
        passes.layout = replace(passes.layout, segments=True)
        if proof.apart(fused=passes.fused, packed=True, segments=True):
            passes.layout = replace(passes.layout, segments=False)
            leave_segments(model)
    segments = passes.layout.segments
    if not segments and proof.sequences > 1 and (distance := proof.apart(fused=passes.fused, packed=True)):
        passes.layout = replace(passes.layout, packed=False)
        context.warn(
            f"this model lets packed documents see each other: log-probabilities differ by {distance:.3g}; each "
            "document is a row of its own instead, which takes longer"
        )
    packed = passes.layout.packed
    if rows[0].paired and not segments and not sees_all(model, rows):
        passes.layout = replace(passes.layout, shared=False)
    elif rows[0].paired and (
        distance := proof.apart(fused=passes.fused, packed=packed, shared=True, segments=segments)
    ):
        passes.layout = replace(passes.layout, shared=False)
        context.warn(
            f"this model does not take answers that share a prompt: log-probabilities differ by {distance:.3g}; each "
            "has its own copy of the prompt instead, which takes longer"
        )
    if steady:
        proof.check_steady(fused=passes.fused)


def sees_all(model: Any, rows: Sequence[EncodedRow]) -> bool:
    """Whether every token sees all before it, by the masks that transformers' scaled dot-product attention takes as
    they are: a window that is shorter than a row would not be in them."""
    text = model.config.get_text_config()
    if getattr(text, "_attn_implementation", None) != "sdpa":
        return False
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    longest = longest_of(rows)
    return all(window is None or window > longest for window in windows)


def longest_of(rows: Sequence[EncodedRow]) -> int:
    """The tokens of the longest row."""
    known = getattr(rows, "lengths", None)
    return max(len(row) for row in rows) if known is None else int(known.max())


def _referenced(
    rows: Sequence[EncodedRow], needed: np.ndarray, passes: Passes, key: str, context: StageContext, longest: int | None
) -> Sequence[EncodedRow]:
    """Rows with their reference, and with mismatched ones of so many tokens where a number is given."""
    found = with_reference(rows, needed, passes, key, context)
    if longest is None:
        return found
    others = with_reference(Mismatched(rows, longest), needed, passes, digest_value([key, "mismatched"]), context)
    return WithMismatched(found, others)


def _needed(mix: Mix, count: int, seed: int) -> np.ndarray:
    """The places of the rows that will be trained on, at most so many, in an order that is the same each time."""
    if mix.taken == mix.sizes and count >= len(mix):
        return np.arange(len(mix))
    epochs = [mix.order(seed, epoch).numpy() for epoch in range(-(-count // len(mix)))]
    return np.unique(np.concatenate(epochs)[:count])


def _without_dropout(model: torch.nn.Module, context: StageContext) -> None:
    """Turn dropout off: the reference has none, and the first step's loss has to be that of two equal models."""
    found = draws(model)
    for module, name, _ in found:
        setattr(module, name, 0.0)
    if found:
        modules = len({id(module) for module, _, _ in found})
        context.warn(f"dropout is off in {modules} modules: training against a reference uses none")


def _run(trainer: ObjectiveTrainer, receipt: Receipt, config: TrainingConfig, context: StageContext) -> Trained:
    trainer.remove_callback(PrinterCallback)
    looks = trainer.eval_dataset is not None
    trainer.add_callback(Reporter(context, receipt, looks_last=looks and config.keep_best))
    if looks and config.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(config.patience))
    whole, cut_short = checkpoints(Path(str(trainer.args.output_dir)))
    for path in cut_short:
        context.log(f"{path.name} was only partly written: it is removed")
        shutil.rmtree(path)
    if whole:
        context.log(f"resuming from {whole[-1].name}")
    trainer.train(resume_from_checkpoint=str(whole[-1]) if whole else None)
    if context.stopping() and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"stopped at step {trainer.state.global_step}; a checkpoint is written")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses, "the first and the last step are always logged"
    last = losses[-1] if trainer.last_loss is None else trainer.last_loss
    facts: Facts = {
        "steps": trainer.state.global_step,
        "loss_first": losses[0],
        "loss_last": last,
        "trained": receipt.facts(),
    }
    idle = receipt.without_gradient()
    # In the first step the first of a pair of low-rank matrices waits for the second to leave 0.
    if idle and trainer.state.global_step > 1:
        more = f" and {len(idle) - LISTED} more" if len(idle) > LISTED else ""
        context.warn(f"no gradient came to {len(idle)} of the trained tensors: {', '.join(idle[:LISTED])}{more}")
    if looks and config.keep_best and trainer.state.best_metric is not None:
        facts |= {"best_step": trainer.state.best_global_step, "best_eval_loss": trainer.state.best_metric}
    if not looks:
        return Trained(facts, None)
    return Trained(facts, lambda: trainer.evaluate()["eval_loss"])
