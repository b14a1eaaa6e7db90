"""One trainer for every objective, on transformers' Trainer: our batches, our loss, our seeds, our checkpoints."""

from __future__ import annotations

import itertools
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from trl.trainer.utils import add_fused_lm_head

from luthier.api.context import StageContext
from luthier.api.errors import Interrupted, ModelError
from luthier.api.stages import Facts
from luthier.api.training import Objective, Optimizer, Regularizer, Schedule, TokenBatch
from luthier.api.tuning import TrainingConfig
from luthier.artifacts.checkpoints import checkpoints, mark_whole
from luthier.training.batches import Outputs, Reference, collate, draws, evaluating, log_probabilities, units_in
from luthier.training.encoding import EncodedRow
from luthier.training.proof import Proof, can_fuse

TENSORS = ("input_ids", "attention_mask", "labels", "pairs", "desirable", "position_ids")


def arguments_of(config: TrainingConfig, context: StageContext, *, evaluates: bool) -> TrainingArguments:
    """The arguments of transformers' Trainer for a stage's config."""
    micro = config.micro_batch_size or config.batch_size
    # How often to look at the validation split: after every epoch, or as often as a checkpoint is written.
    evaluation: dict[str, Any] = (
        {"eval_strategy": "epoch"}
        if config.steps is None
        else {"eval_strategy": "steps", "eval_steps": config.save_every}
    )
    return TrainingArguments(
        output_dir=str(context.scratch / "checkpoints"),
        use_cpu=context.device == "cpu",
        bf16=config.precision == "bf16",
        activation_checkpointing=config.gradient_checkpointing,
        max_steps=config.steps or -1,
        num_train_epochs=config.epochs or 1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=config.batch_size // micro,
        logging_steps=config.log_every,
        logging_first_step=True,
        # A loss that is not a number is an error, not a number to leave out.
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=1,
        seed=context.seed,
        # Without it the order of rows depends on what drew random numbers before.
        data_seed=context.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=context.device != "cpu",
        report_to="none",
        disable_tqdm=True,
        **(evaluation if evaluates else {}),
    )


def check_finite(name: str, value: float, step: int) -> None:
    """Stop where numbers have left the finite ones: nothing that is computed from here on means anything.

    Raises:
        ModelError: the value is NaN or infinite.
    """
    if not math.isfinite(value):
        raise ModelError(
            f"{name} is {value} at step {step}: training has diverged",
            hint="lower `learning_rate`, add `warmup`, or look for weights of the model that are far too large",
        )


class Reporter(TrainerCallback):
    """Tells progress and metrics to the context, and stops at a checkpoint when asked to."""

    def __init__(self, context: StageContext) -> None:
        self.context = context

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step >= state.max_steps:
            control.should_log = True
            self._leave_last_evaluation(state, control)
        if self.context.stopping():
            control.should_save = True
            control.should_training_stop = True
        else:
            self.context.progress(state.global_step, state.max_steps, "steps")
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._leave_last_evaluation(state, control)
        return control

    @staticmethod
    def _leave_last_evaluation(state: Any, control: Any) -> None:
        """After the last step the held-out rows wait until it is decided what is stored."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        mark_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        numbers = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, (int, float))}
        for name, value in numbers.items():
            check_finite(name, value, state.global_step)
        self.context.metrics(numbers, state.global_step)


class ObjectiveTrainer(transformers.Trainer):
    """Trains a model on an objective.

    The loss of a step is the mean over all of its units (tokens, completions or pairs), however it is cut into forward
    passes; penalties, and what the model adds itself, are added once a step. The loss that is logged is the
    objective's: the others are logged under their own names.
    """

    # The loss is divided by the units of the whole step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train: Sequence[EncodedRow],
        validation: Sequence[EncodedRow],
        padding: int,
        objective: Objective[Any],
        optimizer: Optimizer[Any],
        regularizers: Sequence[Regularizer[Any]],
    ) -> None:
        self._objective = objective
        self._optimizer_component = optimizer
        self._regularizers = regularizers
        self._padding = padding
        self.packed = True
        self._predicting = False
        self._step: list[tuple[float, int]] = []
        self._fused = can_fuse(model)
        self._logged: dict[str, dict[str, list[tuple[float, int]]]] = {
            "train": defaultdict(list),
            "eval": defaultdict(list),
        }
        super().__init__(
            model=model,
            args=args,
            data_collator=lambda rows: _as_mapping(collate(rows, padding, packed=self.packed)),
            train_dataset=cast("Any", train),
            eval_dataset=cast("Any", validation) or None,
        )
        inside: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        if self._fused:
            add_fused_lm_head(inside, outputs=("log_probs", "is_top1"))
        self._reference = Reference(model) if "reference" in objective.needs else None
        if isinstance(model, PeftModel) and args.activation_checkpointing:
            model.enable_input_require_grads()

    def prove(self, rows: Sequence[EncodedRow], context: StageContext) -> None:
        """Before the first step: give up the shortcuts that do not compute what the model does, and say so.

        Raises:
            ModelError: the model's log-probabilities are not finite, or the reference is another model.
        """
        halves = any(
            parameter.dtype in (torch.bfloat16, torch.float16) for parameter in cast("Any", self.model).parameters()
        )
        precision = "bf16" if self.args.bf16 or halves else "fp32"
        around: Callable[[], Any] = (
            (lambda: torch.autocast(self.args.device.type, torch.bfloat16, cache_enabled=False))
            if self.args.bf16
            else nullcontext
        )
        proof = Proof(self.model, rows, self._padding, precision, around)
        if self._fused and (distance := proof.apart(fused=True, packed=False)):
            self._fused = False
            context.warn(
                "the output head on trained positions alone gives log-probabilities that differ from the model's own "
                f"by {distance:.3g}: all its logits are computed instead, which takes more memory"
            )
        if not self._fused and (distance := proof.apart(fused=False, packed=False)):
            raise ModelError(f"padded rows change the model's log-probabilities, by {distance:.3g}")
        if any(item.lengths for row in rows for item in row.completions) and (
            distance := proof.apart(fused=self._fused, packed=True)
        ):
            self.packed = False
            context.warn(
                f"this model lets packed documents see each other: log-probabilities differ by {distance:.3g}; each "
                "document is a row of its own instead, which takes longer"
            )
        if self._reference is not None:
            proof.check_reference(self._reference, fused=self._fused, packed=self.packed)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Have the recipe's optimizer make both."""
        args = self.args
        schedule = Schedule(
            num_training_steps,
            math.ceil(num_training_steps * args.warmup_steps),
            args.learning_rate,
            cast("Any", str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))),
            args.weight_decay,
        )
        self.optimizer, self.lr_scheduler = self._optimizer_component.make(cast("Any", self.model), schedule)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The batches of a step, and how many units they have together."""
        self._step.clear()
        batches = list(itertools.islice(epoch_iterator, num_batches))
        return batches, sum(units_in(_as_batch(batch), self._objective.unit) for batch in batches)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stop at a loss that is not finite."""
        loss = super().training_step(*args, **kwargs)
        check_finite("the loss", float(loss), self.state.global_step + 1)
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum of the batch's losses over the units of the whole step."""
        batch = _as_batch(inputs)
        outputs = log_probabilities(model, batch, self._reference, fused=self._fused)
        result = self._objective.loss(outputs.completions)
        units = outputs.completions.count(self._objective.unit)
        if tuple(result.losses.shape) != (units,):
            raise ModelError(
                f"the objective '{type(self._objective).__name__}' of {type(self._objective).__module__} gave losses "
                f"of the shape {tuple(result.losses.shape)} for {units} {self._objective.unit}s",
                hint="report this to its author",
            )
        loss = result.losses.sum() / max(1, units if num_items_in_batch is None else num_items_in_batch)
        logged = self._logged["eval" if self._predicting else "train"]
        likeliest = outputs.likeliest
        logged["loss"].append((float(result.losses.detach().float().mean()) if units else 0.0, units))
        logged["token_accuracy"].append((float(likeliest.float().mean()) if len(likeliest) else 0.0, len(likeliest)))
        for name, value in result.logs.items() if units else ():
            logged[name].append((float(value.detach().float().mean()), units))
        if not self._predicting:
            self._step.append(logged["loss"][-1])
            loss = loss + self._added(model, batch, outputs, logged) / self.current_gradient_accumulation_steps
        return (loss, None) if return_outputs else loss

    def _added(
        self, model: Any, batch: TokenBatch, outputs: Outputs, logged: dict[str, list[tuple[float, int]]]
    ) -> Tensor | float:
        """What is added to the objective's loss: penalties, and what the model asks for itself."""
        total: Tensor | float = 0.0
        if outputs.auxiliary is not None:
            logged["auxiliary_loss"].append((float(outputs.auxiliary.detach()), 1))
            total = total + outputs.auxiliary
        for item in self._regularizers:
            penalty = item.penalty(model, batch, outputs.completions)
            logged["penalty"].append((float(penalty.detach()), 1))
            total = total + penalty
        return total

    @property
    def last_loss(self) -> float | None:
        """The objective's loss in the last step, however training was interrupted or logged; None before one."""
        units = sum(count for _, count in self._step)
        return sum(value * count for value, count in self._step) / units if units else None

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch of held-out rows."""
        inputs = self._prepare_inputs(inputs)
        self._predicting = True
        try:
            with evaluating(model), torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs)
        finally:
            self._predicting = False
        return loss, None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was logged: means over units, also of the loss, which transformers weighs by steps and rows."""
        mode = "train" if self.model is not None and self.model.training else "eval"
        prefix = "eval_" if mode == "eval" else ""
        for name, values in self._logged[mode].items():
            total = sum(count for _, count in values)
            if total:
                logs[f"{prefix}{name}"] = sum(value * count for value, count in values) / total
        self._logged[mode].clear()
        super().log(logs, start_time)


def _as_mapping(batch: TokenBatch) -> dict[str, Tensor]:
    """A batch as the Trainer moves it to a device."""
    return {name: value for name in TENSORS if (value := getattr(batch, name)) is not None}


def _as_batch(inputs: dict[str, Tensor]) -> TokenBatch:
    return TokenBatch(*(cast("Any", inputs.get(name)) for name in TENSORS))


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


def train(
    model: Any,
    padding: int,
    rows: Sequence[EncodedRow],
    validation: Sequence[EncodedRow],
    config: TrainingConfig,
    context: StageContext,
) -> Trained:
    """Train a model on encoded rows, from the last checkpoint when there is one.

    Raises:
        Interrupted: the user asked to stop; a checkpoint is written.
        ModelError: a loss is not finite, or the reference is not the model.
    """
    # No progress bars of other libraries: events report the progress.
    transformers.utils.logging.disable_progress_bar()
    objective: Objective[Any] = context.build(config.objective)
    if "reference" in objective.needs:
        _without_dropout(model, context)
    regularizers: list[Regularizer[Any]] = [context.build(use) for use in config.regularizers]
    trainer = ObjectiveTrainer(
        model,
        arguments_of(config, context, evaluates=bool(validation)),
        rows,
        validation,
        padding,
        objective,
        context.build(config.optimizer),
        regularizers,
    )
    trainer.prove(rows, context)
    if getattr(model.config, "output_router_logits", False) and config.micro_batch_size not in (
        None,
        config.batch_size,
    ):
        context.warn("the loss that balances experts is that of each micro-batch: `micro_batch_size` changes it")

    def batches() -> Iterator[TokenBatch]:
        for first in range(0, len(rows), config.batch_size):
            yield collate(rows[first : first + config.batch_size], padding, packed=trainer.packed)

    for regularizer in regularizers:
        regularizer.start(model, batches)
    return _run(trainer, context)


def _without_dropout(model: torch.nn.Module, context: StageContext) -> None:
    """Turn dropout off: the reference has none, and the first step's loss has to be that of two equal models."""
    found = draws(model)
    for module, name, _ in found:
        setattr(module, name, 0.0)
    if found:
        modules = len({id(module) for module, _, _ in found})
        context.warn(f"dropout is off in {modules} modules: training against a reference uses none")


def _run(trainer: ObjectiveTrainer, context: StageContext) -> Trained:
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Reporter(context))
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
    facts: Facts = {"steps": trainer.state.global_step, "loss_first": losses[0], "loss_last": last}
    if trainer.eval_dataset is None:
        return Trained(facts, None)
    return Trained(facts, lambda: trainer.evaluate()["eval_loss"])
