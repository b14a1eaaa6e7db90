"""One protocol per kind of component: what the class behind `Component.impl` has to have.

Each is made with its validated config, ``impl(config)``, in the worker process; an `executor` is made
in the caller's process. Torch appears in type hints only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypedDict

from luthier.api.artifact import Artifact
from luthier.api.context import StageContext

if TYPE_CHECKING:
    from subprocess import Popen

    from torch import Tensor, nn

Facts = dict[str, Any]
Row = dict[str, Any]


class Message(TypedDict):
    """One turn of a conversation; `role` is ``system``, ``user``, ``assistant`` or ``tool``."""

    role: str
    content: str


class Stage(Protocol):
    """Kind ``stage``: one step of a recipe."""

    def run(self, context: StageContext) -> Facts:
        """Write the artifact into ``context.out`` and return the facts for its manifest.

        Facts are plain values (as JSON has them), and tell at least what `luthier.api.artifact.REQUIRED_FACTS` lists
        for the kind of artifact; `luthier.artifacts` makes those of datasets and models.
        """
        ...


class Adapter(Protocol):
    """Kind ``adapter``: a parameter-efficient way to train a model."""

    def load_options(self) -> dict[str, Any]:
        """Extra arguments for ``from_pretrained``, such as a quantization config."""
        ...

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model with a fresh, trainable adapter, as a ``peft.PeftModel``."""
        ...


class Regularizer(Protocol):
    """Kind ``regularizer``: a term added to the training loss."""

    def start(self, model: nn.Module) -> None:
        """Called once before the first step, with the model as it is about to be trained."""
        ...

    def penalty(self, model: nn.Module) -> Tensor:
        """The term to add to the loss: a scalar on the model's device."""
        ...


@dataclass(frozen=True, slots=True)
class PreferenceBatch:
    """Log-probabilities of a batch of preference pairs, in nats.

    Attributes:
        chosen: Sum over the chosen completion's tokens under the policy, shape (pairs,).
        rejected: The same for the rejected completion, shape (pairs,).
        reference_chosen: Under the reference model, shape (pairs,); None without a reference.
        reference_rejected: The same for the rejected completion.
        chosen_tokens: Number of tokens in the chosen completions, shape (pairs,).
        rejected_tokens: Number of tokens in the rejected completions, shape (pairs,).
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    chosen_tokens: Tensor
    rejected_tokens: Tensor


class PreferenceLoss(Protocol):
    """Kind ``preference_loss``: how a pair of completions becomes a loss."""

    needs_reference: ClassVar[bool]

    def loss(self, batch: PreferenceBatch, beta: float) -> Tensor:
        """The loss of each pair, shape (pairs,)."""
        ...


class Quantizer(Protocol):
    """Kind ``quantizer``: weights with fewer bits, in a format of the Hugging Face world.

    Attributes:
        largest_kl: The largest mean KL divergence to the model that is still right, in nats per token.
    """

    largest_kl: float

    def quantize(self, model: Artifact, calibration: Iterable[str], out: Path, context: StageContext) -> Facts:
        """Write the quantized weights of a full model to `out`, as safetensors.

        Args:
            model: A model; an adapter has been folded into its base.
            calibration: Texts as the model is shown them; none where the recipe has no data.
            out: Where the files go; config and tokenizer are written by the exporter that asks.

        Returns:
            What the manifest should say: ``quantization_config`` for ``config.json``, ``dtype`` of what is not
            quantized, ``layers``, how many are.
        """
        ...


class Exporter(Protocol):
    """Kind ``exporter``: a model as a file for the program that will serve it."""

    def export(self, model: Artifact, context: StageContext) -> Facts:
        """Write the files to ``context.out``, check them in the real program, return the facts."""
        ...

    def serve(self, export: Artifact, variant: str | None, limit: int) -> AbstractContextManager[Teacher]:
        """Load an export in the program it is made for, to be asked there.

        Args:
            export: An artifact that `export` made.
            variant: Which of its files; by default the last.
            limit: The most tokens of an answer.
        """
        ...


class Augmenter(Protocol):
    """Kind ``augmenter``: new rows from rows, or from nothing."""

    def rows(self, rows: Sequence[Row], seed: int) -> Iterator[Row]:
        """Yield new rows, made from those given. The same seed must give the same rows."""
        ...


class Teacher(Protocol):
    """Kind ``teacher``: a model that answers prompts, to distil from or to judge with."""

    def answer(self, prompts: Sequence[Sequence[Message]]) -> Iterator[str]:
        """Yield one answer per prompt, in order."""
        ...


class Format(Protocol):
    """Kind ``format``: how a raw data row becomes a checked row of a dataset."""

    columns: ClassVar[tuple[str, ...]]

    def parse(self, raw: Mapping[str, Any]) -> Row:
        """A checked row with exactly `columns`.

        Raises:
            DataError: what is wrong with the row and what to do; the caller adds file and line.
        """
        ...


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model said to one prompt, beside the reference answer."""

    prompt: str
    prediction: str
    reference: str


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """The model's loss on one row: the sum of -log p over its target tokens, in nats."""

    nll: float
    tokens: int


class Metric(Protocol):
    """Kind ``metric``: a number for a model's quality."""

    needs: ClassVar[Literal["predictions", "losses"]]

    def score(self, items: Sequence[Any]) -> float:
        """The metric over all items: `Prediction`s or `TokenLoss`es, as `needs` says."""
        ...


class Reward(Protocol):
    """Kind ``reward``: a score for a completion, for training from rewards."""

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> Sequence[float]:
        """One score per completion; higher is better."""
        ...


class Tracker(Protocol):
    """Kind ``tracker``: where metrics go while a stage runs."""

    def start(self, folder: Path, stage: str) -> None:
        """A stage starts; `folder` belongs to the run."""
        ...

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Metrics of one step."""
        ...

    def finish(self) -> None:
        """The stage ended, well or badly."""
        ...


class Executor(Protocol):
    """Kind ``executor``: where worker processes run."""

    def launch(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Popen[str]:
        """Start the worker: it reads jobs on stdin and writes events on stdout, as JSON lines."""
        ...


PROTOCOL_METHODS: dict[str, tuple[str, ...]] = {
    "stage": ("run",),
    "adapter": ("load_options", "wrap"),
    "regularizer": ("start", "penalty"),
    "preference_loss": ("loss", "needs_reference"),
    "merge": ("merge", "granularity"),
    "quantizer": ("quantize",),
    "exporter": ("export", "serve"),
    "augmenter": ("rows",),
    "teacher": ("answer",),
    "format": ("parse", "columns"),
    "metric": ("score", "needs"),
    "reward": ("score",),
    "tracker": ("start", "log", "finish"),
    "executor": ("launch",),
}
"""What the conformance check looks for on each kind's `impl`."""
