"""The protocols of training: adapters, objectives, regularizers, optimizers, rewards, and what they see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from luthier.api.component import C, Implementation
from luthier.api.data import Row

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer as TorchOptimizer
    from torch.optim.lr_scheduler import LRScheduler

    from luthier.api.serving import Completion

Unit = Literal["token", "completion", "pair"]
"""What an objective has one loss for; the step's loss is the mean over all of them, however the step is cut."""
Need = Literal["reference", "mismatched"]
"""What an objective wants beside the policy's log-probabilities: those of the reference, and both of answers that stand
behind the prompts of other rows."""


class Adapter(Implementation[C]):
    """Kind ``adapter``: a parameter-efficient way to train a model."""

    def load_options(self) -> Mapping[str, Any]:
        """How its base is loaded, as plain values: ``{"quantization": {...}}`` has the arguments of transformers'
        ``BitsAndBytesConfig``, dtypes by their names. The adapter's artifact keeps them, so that training it
        further loads the base in the same way. By default nothing special."""
        return {}

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model with a fresh, trainable adapter, as a ``peft.PeftModel``."""
        raise NotImplementedError

    def learning_rate_scale(self, name: str) -> float:
        """By what the learning rate of one of its parameters is multiplied; by default nothing is changed."""
        return 1.0


@dataclass(frozen=True, slots=True)
class Segments:
    """Runs of tokens in one sequence, and what each sees: the keys of a run end with its own tokens, and a token sees
    those up to itself.

    Attributes:
        queries: The tokens of each run.
        keys: What it may see: its own tokens, and what stands before them, such as a prompt that others see as well.
        query_ends: 0 and the ends of the runs, int32, shape (runs + 1,).
        key_ends: 0 and the ends of their keys, where these lie one behind the other, of the same shape and kind.
        seen: The places of those keys in the sequence, shape (keys,); None where runs see themselves alone.
    """

    queries: list[int]
    keys: list[int]
    query_ends: Tensor
    key_ends: Tensor
    seen: Tensor | None

    def to(self, device: Any, *, non_blocking: bool = False) -> Segments:
        """The same on another device."""
        query_ends, key_ends = (ends.to(device, non_blocking=non_blocking) for ends in (self.query_ends, self.key_ends))
        seen = None if self.seen is None else self.seen.to(device, non_blocking=non_blocking)
        return Segments(self.queries, self.keys, query_ends, key_ends, seen)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """What goes into the model: sequences of tokens, each of one completion with the prompt that it follows, or of
    several that do not see each other.

    Attributes:
        input_ids: Shape (sequences, length), padded at the right.
        attention_mask: 1 for tokens, 0 for padding, of the same shape.
        sources: Of each token that is trained, the position before it, from which the model predicts it: a place in the
            flattened `input_ids`, shape (targets,).
        targets: The ids of those tokens, shape (targets,).
        owner: Which completion a target belongs to, shape (targets,).
        completions: How many there are.
        position_ids: Each token's place in its document, shape (sequences, length); None where every sequence is one
            document.
        documents: Which document of its sequence a token belongs to, -1 for padding, of the same shape; None where no
            prompt is shared.
        branches: 0 for the tokens of a prompt that several answers share, 1 and up for those of each answer, of the
            same shape; None where no prompt is shared.
        segments: What the tokens of the only sequence see, where attention is computed by it; else None, and
            `documents` and `branches` say it.
        pairs: See `CompletionBatch`.
        desirable: See `CompletionBatch`.
        weights: See `CompletionBatch`.
        reference_logps: See `CompletionBatch`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    sources: Tensor
    targets: Tensor
    owner: Tensor
    completions: int
    position_ids: Tensor | None = None
    documents: Tensor | None = None
    branches: Tensor | None = None
    segments: Segments | None = None
    pairs: Tensor | None = None
    desirable: Tensor | None = None
    weights: Tensor | None = None
    reference_logps: Tensor | None = None

    def to(self, device: Any) -> TokenBatch:
        """The batch on another device."""
        moved = {
            item.name: value.to(device, non_blocking=True) if hasattr(value, "to") else value
            for item in fields(self)
            for value in (getattr(self, item.name),)
        }
        return TokenBatch(**moved)

    def model_inputs(self) -> dict[str, Any]:
        """What a causal model is called with, so that no completion sees another.

        Padding at the right is seen by nothing but padding, and needs no mask. Where prompts are shared there is one
        of true and false, of shape (sequences, 1, length, length), as scaled dot-product attention takes it, unless
        `segments` tell attention.
        """
        if self.position_ids is None:
            return {"input_ids": self.input_ids}
        # Positions that begin anew are how transformers tells documents apart, if no mask says otherwise.
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "position_ids": self.position_ids}
        if self.segments is not None:
            return {**inputs, "segments": self.segments}
        if self.branches is None:
            return inputs
        assert self.documents is not None, "both are there, or none"
        documents, branches = self.documents, self.branches
        seen = (documents[:, :, None] == documents[:, None, :]).tril()
        seen &= (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
        return {**inputs, "attention_mask": seen[:, None]}


@dataclass(frozen=True, slots=True)
class CompletionBatch:
    """Log-probabilities of completions, in nats; ragged, so that padded and packed batches look alike.

    Attributes:
        logps: Of each target token under the policy, shape (targets,).
        owner: Which completion a target belongs to, shape (targets,).
        sums: `logps` added up by completion, shape (completions,).
        lengths: Targets of each completion, shape (completions,).
        reference_logps: As `logps`, under the reference: the model as the stage was given it; None where the
            objective does not need it.
        reference_sums: `reference_logps` added up by completion.
        pairs: The chosen and the rejected completion of each pair, shape (pairs, 2); None without pairs.
        desirable: Whether a completion is a good one, shape (completions,); None without such labels.
        weights: How much each completion weighs in the loss, shape (completions,); None where all weigh the same.
        mismatch: The mean, over all rows of the step, of log p under the policy less that under the reference of an
            answer to another prompt; a scalar without a gradient, None where the objective does not need it.
    """

    logps: Tensor
    owner: Tensor
    sums: Tensor
    lengths: Tensor
    reference_logps: Tensor | None = None
    reference_sums: Tensor | None = None
    pairs: Tensor | None = None
    desirable: Tensor | None = None
    weights: Tensor | None = None
    mismatch: Tensor | None = None

    def by_completion(self, values: Tensor) -> Tensor:
        """Values of targets, shape (targets,), added up by completion, shape (completions,)."""
        return values.new_zeros(len(self.lengths)).index_add(0, self.owner, values)

    def sides(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values of completions, shape (completions,): those of the chosen and of the rejected ones, each (pairs,)."""
        assert self.pairs is not None, "an objective on pairs reads rows of the schema `preference`"
        return values[self.pairs[:, 0]], values[self.pairs[:, 1]]

    def unit_weights(self, unit: Unit) -> Tensor | None:
        """How much each unit weighs in the loss, shape (units,); None where all weigh the same."""
        if self.weights is None:
            return None
        if unit == "token":
            return self.weights[self.owner]
        return self.weights if unit == "completion" else self.sides(self.weights)[0]

    def count(self, unit: Unit) -> int:
        """How many units there are."""
        if unit == "token":
            return len(self.logps)
        if unit == "completion":
            return len(self.lengths)
        assert self.pairs is not None, "an objective on pairs reads rows of the schema `preference`"
        return len(self.pairs)


@dataclass(frozen=True, slots=True)
class LossResult:
    """What an objective makes of a batch.

    Attributes:
        losses: One for each unit, shape (units,).
        logs: Values to log beside the loss, each a scalar or one for each unit, of which the mean is logged.
    """

    losses: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])


class Objective(Implementation[C]):
    """Kind ``objective``: what training minimises. Its config says which rows it is for, see `ObjectiveConfig`."""

    unit: ClassVar[Unit]
    """What there is one loss for."""
    needs: frozenset[Need] = frozenset()
    """What it wants beside the policy's log-probabilities."""

    def loss(self, batch: CompletionBatch) -> LossResult:
        """The loss of each unit; the trainer takes the mean over the whole optimizer step."""
        raise NotImplementedError


class Regularizer(Implementation[C]):
    """Kind ``regularizer``: a term added to the training loss."""

    def start(self, model: nn.Module, batches: Callable[[], Iterator[TokenBatch]]) -> None:
        """Called once before the first step.

        Args:
            model: The model as it is about to be trained.
            batches: Gives the training batches, each time from the first, for those that need data.
        """

    def penalty(self, model: nn.Module, batch: TokenBatch, outputs: CompletionBatch) -> Tensor:
        """The term to add to the loss of a step: a scalar on the model's device."""
        raise NotImplementedError


def _unscaled(name: str) -> float:
    return 1.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """What a training stage says of its steps.

    Attributes:
        steps: Optimizer steps in all.
        warmup_steps: Over how many of them the learning rate rises from 0.
        learning_rate: Its peak.
        shape: How it falls after the peak.
        weight_decay: The stage's weight decay.
        decay_steps: Over how many steps at the end it falls, for the shape ``wsd``.
        scale: By what the learning rate of a parameter is multiplied, by its name.
    """

    steps: int
    warmup_steps: int
    learning_rate: float
    shape: Literal["linear", "cosine", "constant", "wsd"]
    weight_decay: float
    decay_steps: int = 0
    scale: Callable[[str], float] = _unscaled


class Optimizer(Implementation[C]):
    """Kind ``optimizer``: how weights follow their gradients."""

    def make(self, model: nn.Module, schedule: Schedule) -> tuple[TorchOptimizer, LRScheduler]:
        """An optimizer of the trainable parameters, and what sets its learning rate step by step.

        `luthier.training.optimizers` has what most need: parameters in groups with and without weight decay, and the
        scheduler of a schedule.
        """
        raise NotImplementedError


class Reward(Implementation[C]):
    """Kind ``reward``: a score for a completion, for training from rewards."""

    def score(self, completions: Sequence[Completion], rows: Sequence[Row]) -> Sequence[float | None]:
        """One score a completion, higher is better; None where it cannot be judged, which is counted.

        Args:
            completions: What was answered.
            rows: For each completion the row that it answers, all columns included.
        """
        raise NotImplementedError
