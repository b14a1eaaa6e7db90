"""Tells what happens while a model is trained, and stops at a checkpoint when asked to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from luthier.api.context import StageContext
from luthier.api.errors import ModelError
from luthier.artifacts.checkpoints import mark_whole
from luthier.training.receipt import Receipt

REMEDY = "lower `learning_rate`, add `warmup`, or look for weights of the model that are far too large"


def check_finite(name: str, value: float, step: int) -> None:
    """Stop where numbers have left the finite ones: nothing that is computed from here on means anything.

    Raises:
        ModelError: the value is NaN or infinite.
    """
    if not math.isfinite(value):
        raise ModelError(
            f"{name} is {value} at step {step}: training has diverged",
            hint=REMEDY,
        )


class Reporter(TrainerCallback):
    """Tells progress and metrics to the context, and stops at a checkpoint when asked to.

    Args:
        context: Is told.
        receipt: Is kept beside checkpoints.
        looks_last: Whether held-out rows are looked at after the last step too.
    """

    def __init__(self, context: StageContext, receipt: Receipt, *, looks_last: bool = False) -> None:
        self.context = context
        self._receipt = receipt
        self._looks_last = looks_last

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step >= state.max_steps:
            control.should_log = True
            self._leave_last_evaluation(state, control)
        if control.should_save and self._receipt.watch.spiking:
            # The checkpoint before it is the better one to go on from.
            self.context.log(f"no checkpoint at step {state.global_step}: the loss is far above that of the first")
            control.should_save = False
        if self.context.stopping():
            control.should_save = True
            control.should_training_stop = True
        else:
            self.context.progress(state.global_step, state.max_steps, "steps")
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._leave_last_evaluation(state, control)
        return control

    def _leave_last_evaluation(self, state: Any, control: Any) -> None:
        """After the last step the held-out rows wait until it is decided what is stored, unless they decide it."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = self._looks_last
            control.should_save = self._looks_last or control.should_save

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._receipt.keep()
        mark_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        numbers = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, (int, float))}
        for name, value in numbers.items():
            check_finite(name, value, state.global_step)
        speed = self._receipt.speed()
        if speed is not None and "loss" in numbers:
            numbers["tokens_per_second"] = speed
        self.context.metrics(numbers, state.global_step)
