"""Runs TRL's trainers the way Luthier wants them: our labels, our seeds, our checkpoints, no surprises."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from luthier.api.context import StageContext
from luthier.api.errors import Interrupted, ModelError
from luthier.api.protocols import Facts, Regularizer
from luthier.api.training import TrainingConfig
from luthier.artifacts.checkpoints import checkpoints, mark_whole
from luthier.modeling.text import Encoded


def quiet_libraries() -> None:
    """No progress bars of other libraries: events tell the progress."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def trainer_arguments(config: TrainingConfig, context: StageContext) -> dict[str, Any]:
    """The arguments that all of TRL's trainers share.

    bf16 and checkpointing are on by default in TRL; here the recipe decides.
    """
    import torch

    return {
        "output_dir": str(context.work / "checkpoints"),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": config.precision == "bf16",
        "activation_checkpointing": config.gradient_checkpointing,
        "max_steps": config.steps or -1,
        "num_train_epochs": config.epochs or 1,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": config.warmup,
        "weight_decay": config.weight_decay,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulate,
        "logging_steps": config.log_every,
        "logging_first_step": True,
        "save_strategy": "steps",
        "save_steps": config.save_every,
        "save_total_limit": 1,
        "seed": context.seed,
        # Without it the order of rows hangs on whatever drew random numbers before.
        "data_seed": context.seed,
        "report_to": "none",
        "disable_tqdm": True,
    }


class Reporter(TrainerCallback):
    """Tells progress and metrics to the context, and stops at a checkpoint when asked to."""

    def __init__(self, context: StageContext) -> None:
        self.context = context

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step >= state.max_steps:
            control.should_log = True
        if self.context.stopping():
            control.should_save = True
            control.should_training_stop = True
        else:
            self.context.progress(state.global_step, state.max_steps, "steps")
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        mark_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        numbers = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, (int, float))}
        self.context.metrics(numbers, state.global_step)


def run_trainer(trainer: Any, context: StageContext) -> Facts:
    """Train, from the last checkpoint when there is one.

    Returns:
        The facts ``steps``, ``loss_first`` and ``loss_last`` (and ``eval_loss`` where there is one).

    Raises:
        Interrupted: the user asked to stop; a checkpoint is written.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Reporter(context))
    whole, cut_short = checkpoints(Path(trainer.args.output_dir))
    for path in cut_short:
        context.log(f"{path.name} was cut short while it was written: it is removed")
        shutil.rmtree(path)
    if whole:
        context.log(f"resuming from {whole[-1].name}")
    trainer.train(resume_from_checkpoint=str(whole[-1]) if whole else None)
    if context.stopping() and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"stopped at step {trainer.state.global_step}; a checkpoint is written")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses, "the first and the last step are always logged"
    facts: Facts = {"steps": trainer.state.global_step, "loss_first": losses[0], "loss_last": losses[-1]}
    return facts | ({"eval_loss": evaluations[-1]} if evaluations else {})


def check_head(model: Any) -> None:
    """Refuse to train an adapter on the output head: TRL's losses read the head's weight and go past its adapter.

    Raises:
        ModelError: the model has one.
    """
    inside: Any = model.get_base_model() if isinstance(model, PeftModel) else None
    if inside is not None and isinstance(inside.get_output_embeddings(), BaseTunerLayer):
        raise ModelError(
            "the adapter changes the output head, and training would go past it",
            hint="make the adapter without `lm_head` among its `target_modules`, or fold it into its model first, with "
            "the stage `merge` and `method: passthrough`",
        )


def started(config: TrainingConfig, model: Any, context: StageContext) -> list[Regularizer]:
    """The config's regularizers, each of which has seen the model before its first step."""
    regularizers: list[Regularizer] = [context.component(use) for use in config.regularizers]
    for regularizer in regularizers:
        regularizer.start(model)
    return regularizers


def penalties(regularizers: Sequence[Regularizer], model: Any) -> Any:
    """The sum of what the regularizers add to the loss."""
    return sum(regularizer.penalty(model) for regularizer in regularizers)


def evaluation_arguments(config: TrainingConfig) -> dict[str, Any]:
    """When to look at the validation split: after every epoch, or as often as a checkpoint is written."""
    if config.steps is None:
        return {"eval_strategy": "epoch"}
    return {"eval_strategy": "steps", "eval_steps": config.save_every}


class _Trainer(SFTTrainer):
    """SFTTrainer with regularizers, and without the model card it writes into checkpoints."""

    def __init__(self, *args: Any, regularizers: Sequence[Regularizer], **kwargs: Any) -> None:
        self._regularizers = regularizers
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if not self._regularizers or not model.training:
            return result
        # The Trainer divides by the accumulation steps only where the loss is a mean over them.
        extra = penalties(self._regularizers, model) / self.args.gradient_accumulation_steps
        return (result[0] + extra, result[1]) if isinstance(result, tuple) else result + extra

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        return None


def train_tokens(
    model: Any,
    tokenizer: Any,
    train: Sequence[Encoded],
    validation: Sequence[Encoded],
    config: TrainingConfig,
    context: StageContext,
) -> Facts:
    """Train on ready tokens and labels with TRL's SFTTrainer, which does no templating of its own then.

    Raises:
        ModelError: the model has an adapter on its output head.
    """
    check_head(model)
    quiet_libraries()
    arguments = trainer_arguments(config, context)
    if validation:
        arguments |= evaluation_arguments(config)
    regularizers = started(config, model, context)
    trainer = _Trainer(
        model=model,
        args=SFTConfig(max_length=None, packing=False, dataset_kwargs={"skip_prepare_dataset": True}, **arguments),
        train_dataset=_dataset(train),
        eval_dataset=_dataset(validation) if validation else None,
        processing_class=tokenizer,
        regularizers=regularizers,
    )
    return run_trainer(trainer, context)


def _dataset(rows: Sequence[Encoded]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    )
