"""One trainer for every objective, on transformers' Trainer: our batches, our loss, our seeds, our checkpoints."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import transformers
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainingArguments

from luthier.api.errors import ModelError
from luthier.training.encoding import EncodedRow
from luthier.training.mixing import Mix
from luthier.training.passes import Logged, Passes
from luthier.training.receipt import Receipt
from luthier.training.reporter import REMEDY

ROWS = "rows"
"""The one entry of a batch: the rows of an optimizer step."""


class Shuffled(Sampler[int]):
    """The order of rows: another in each epoch, the same whatever else drew random numbers.

    Args:
        mix: How many rows there are, and how many of them an epoch takes.
        seed: The seed.
    """

    def __init__(self, mix: Mix, seed: int) -> None:
        self._mix, self._seed, self._epoch = mix, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._mix)

    def __iter__(self) -> Iterator[int]:
        # One at a time: as a list of Python numbers the order of a million rows takes 30 MB.
        for place in self._mix.order(self._seed, self._epoch):
            yield int(place)


@dataclass(frozen=True, slots=True)
class Words:
    """What is said of a loss that runs away.

    Attributes:
        describe: Gives the beginning of a row, as text.
        warn: Is told, where training goes on.
        stops: Whether it ends.
    """

    describe: Callable[[EncodedRow], str]
    warn: Callable[[str], None]
    stops: bool


class ObjectiveTrainer(transformers.Trainer):
    """Trains a model on an objective; one of its batches is a whole optimizer step, see `Passes`.

    Args:
        model: The model.
        args: Its arguments.
        train: The rows.
        validation: Rows that are looked at while it trains.
        passes: Computes steps.
        optimizers: The recipe's, and what sets its learning rate.
        receipt: Watches what is trained.
        mix: Which rows an epoch takes.
        words: What is said of a loss that runs away.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train: Sequence[EncodedRow],
        validation: Sequence[EncodedRow],
        passes: Passes,
        optimizers: tuple[Any, Any],
        receipt: Receipt,
        mix: Mix,
        words: Words,
    ) -> None:
        self._mix = mix
        self._describe, self._warn, self._stops = words.describe, words.warn, words.stops
        self._began, self._told = "", False
        self._passes = passes
        self._receipt = receipt
        self._logged = {"train": Logged(), "eval": Logged()}
        self.last_loss: float | None = None
        super().__init__(
            model=model,
            args=args,
            data_collator=_as_step,
            train_dataset=cast("Any", train),
            eval_dataset=cast("Any", validation) if len(validation) else None,
            optimizers=optimizers,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return Shuffled(self._mix, self.args.seed)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The next step, and no count of its items: passes divide by their own."""
        return [step for _, step in zip(range(num_batches), epoch_iterator, strict=False)], None

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted by transformers' rule of thumb."""
        return 0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The gradients of a step, cut smaller where memory does not suffice.

        Raises:
            ModelError: the loss is not finite, or one row does not fit.
        """
        model.train()
        rows: Sequence[EncodedRow] = inputs[ROWS]
        with self._receipt.step(rows):
            loss, logged = within_memory(self._passes, rows, lambda: self._passes.step(rows, self.accelerator.backward))
            self._check(loss, rows)
        self.last_loss = loss
        self._logged["train"].join(logged)
        return torch.tensor(loss, device=self.args.device)

    def _check(self, loss: float, rows: Sequence[EncodedRow]) -> None:
        """Stop where the loss is no number, or has run away.

        Raises:
            ModelError: shows the batch with which it began.
        """
        watch, step = self._receipt.watch, self.state.global_step + 1
        calm = not watch.spiking
        watch.add(loss)
        if (calm and watch.spiking) or not math.isfinite(loss):
            self._began = f"step {step}, {self._worst(rows)}"
        if not math.isfinite(loss):
            raise ModelError(f"the loss is {loss} at step {step}: training has diverged; {self._began}", hint=REMEDY)
        if watch.diverged and self._stops:
            raise ModelError(
                f"the loss has run away: {loss:.4g} at step {step}, {watch.usual:.4g} in the first steps; it began at "
                f"{self._began}",
                hint=f"{REMEDY}; or train on all the same: `on_divergence: warn`. The last good checkpoint is kept",
            )
        if watch.diverged and not self._told:
            self._told = True
            self._warn(f"the loss has run away: {loss:.4g} at step {step}; it began at {self._began}")

    def _worst(self, rows: Sequence[EncodedRow]) -> str:
        """The row of a step with the largest loss, in words."""
        losses = [self._passes.evaluate([row])[0] for row in rows]
        # NaN is larger than any number here.
        place = max(range(len(rows)), key=lambda number: (not math.isfinite(losses[number]), losses[number]))
        return f"where the loss of a row is {losses[place]:.4g}: {self._describe(rows[place])}"

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of some held-out rows."""
        loss, logged = within_memory(self._passes, inputs[ROWS], lambda: self._passes.evaluate(inputs[ROWS]))
        self._logged["eval"].join(logged)
        return torch.tensor(loss, device=self.args.device), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was logged: means over units, also of the loss, which transformers weighs by steps and rows."""
        mode = "train" if self.model is not None and self.model.training else "eval"
        prefix = "eval_" if mode == "eval" else ""
        logs |= {f"{prefix}{name}": value for name, value in self._logged[mode].means().items()}
        self._logged[mode].clear()
        super().log(logs, start_time)


def _as_step(rows: list[EncodedRow]) -> dict[str, list[EncodedRow]]:
    return {ROWS: rows}


T = TypeVar("T")


def within_memory(passes: Passes, rows: Sequence[EncodedRow], compute: Callable[[], T]) -> T:
    """What `compute` gives; where memory does not suffice, passes become smaller and it begins anew.

    Gradients are thrown away and random numbers drawn again, so that nothing of the failed attempt is left.

    Raises:
        ModelError: one row alone does not fit.
    """
    while True:
        drawn = _random_state()
        try:
            return compute()
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            longest = max(len(row) for row in rows)
            tokens = passes.limits.tokens or sum(len(row) * len(row.completions) for row in rows)
            smallest = len(passes.layout.cut(rows, tokens, passes.limits.rows)) >= len(rows)
            if smallest and not passes.may_save_memory:
                raise ModelError(
                    f"a row of {longest} tokens does not fit into memory by itself",
                    hint="turn on `gradient_checkpointing`, lower `max_length`, or train an adapter on a 4-bit base",
                ) from None
            if smallest:
                passes.save_memory()
            else:
                passes.limits.tokens = max(1, tokens // 2)
        # Outside of the handler: its traceback holds on to what did not fit.
        for parameter in passes.model.parameters():
            parameter.grad = None
        _set_random_state(drawn)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
