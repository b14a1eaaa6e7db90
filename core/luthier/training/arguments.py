"""A stage's config as transformers' Trainer is told it."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from luthier.api.context import StageContext
from luthier.api.tuning import TrainingConfig


def arguments_of(config: TrainingConfig, context: StageContext, steps: int, *, evaluates: bool) -> TrainingArguments:
    """The arguments of transformers' Trainer for a stage's config.

    One of its batches is a whole optimizer step: `luthier.training.trainer` cuts it into passes, and computes them in
    the precision that it chose.
    """
    evaluation, save_every = _looks(config) if evaluates else ({}, config.save_every)
    return TrainingArguments(
        output_dir=str(context.scratch / "checkpoints"),
        use_cpu=context.device == "cpu",
        bf16=False,
        max_steps=steps,
        max_grad_norm=config.max_grad_norm,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=1,
        logging_steps=config.log_every,
        logging_first_step=True,
        # A loss that is not a number is an error, not a number to leave out.
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=1,
        # How long there was no better loss goes on where it was.
        restore_callback_states_from_checkpoint=config.patience is not None,
        neftune_noise_alpha=config.neftune_noise_alpha,
        seed=context.seed,
        remove_unused_columns=False,
        # Rows are Python objects until they are cut into passes.
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        **evaluation,
    )


def _looks(config: TrainingConfig) -> tuple[dict[str, Any], int]:
    """How often to look at the validation split, and steps between checkpoints: a best one has to be one of them."""
    if not config.keep_best and config.patience is None:
        if config.eval_every is None and config.steps is None:
            return {"eval_strategy": "epoch"}, config.save_every
        return {"eval_strategy": "steps", "eval_steps": config.eval_every or config.save_every}, config.save_every
    every = config.eval_every or config.save_every
    best = {
        "load_best_model_at_end": config.keep_best,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    }
    return {"eval_strategy": "steps", "eval_steps": every, **best}, every if config.keep_best else config.save_every
