"""The protocols of what answers and of what is served: generators, quantizers, exporters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from luthier.api.artifact import Artifact
from luthier.api.component import C, Implementation
from luthier.api.data import Message
from luthier.api.stages import Facts

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from luthier.api.context import StageContext

FinishReason = Literal["stop", "length", "refused"]
"""Why an answer ended: on its own, at the limit, or before it began: the program would not answer this request."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_new_tokens: The maximum number of tokens in an answer.
        temperature: 0 takes the likeliest token each time.
        top_p: Draw among the likeliest tokens that have this probability together.
        n: Answers to each request; several of them need a temperature.
        seed: The seed of the draws.
        json_schema: The JSON schema that every answer must follow; for generators that can hold an answer to one.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1
    seed: int = 0
    json_schema: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer.

    Attributes:
        text: What was said, without the stop token.
        tokens: How many tokens it was, the stop token included; None where the program does not say.
        finish_reason: Why it ended; None where the program does not say.
        thinking: What was thought before the answer, where somebody has split it off `text`.
        prompt_tokens: How many tokens the request was; None where the program does not say.
        problem: Why it was refused.
    """

    text: str
    tokens: int | None = None
    finish_reason: FinishReason | None = None
    thinking: str = ""
    prompt_tokens: int | None = None
    problem: str = ""


Request = Sequence[Message]
"""A conversation that waits for the assistant."""


class Generator(Implementation[C]):
    """Kind ``generator``: what answers. A context manager: leaving it frees what it holds.

    Stages ask through `luthier.serving.asking`, which keeps every answer on disk, so that none is made, or paid for,
    a second time.
    """

    at_once: int | None = None
    """How many threads may ask at the same time, each one request; None: it computes here, and is handed many
    requests together."""

    @property
    def answers_as(self) -> str | None:
        """Who answers, as a text: the answers of all who have the same are the same. None: this stage's own."""
        return None

    def account(self, completion: Completion) -> str:
        """Take an answer into account: each that is used, in no order, whether it was made now or kept from before.

        Returns:
            What all of them cost, in words; empty where that is of no interest.
        """
        return ""

    def may_ask(self) -> None:
        """Called before something is asked.

        Raises:
            ModelError: no more may be asked, because a budget is spent.
        """

    def give_up(self) -> None:
        """No more answers are wanted: what waits to try again, stops."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sequence[Completion]]:
        """Yield the `sampling.n` answers to each request, in the order of the requests.

        Raises:
            DataError: the chat template refuses a request.
            ModelError: the program cannot answer.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Free what it holds: a model, a process, a connection."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Quantizer(Implementation[C]):
    """Kind ``quantizer``: weights with fewer bits, in a layout of the Hugging Face world."""

    context: StageContext

    @property
    def largest_kl(self) -> float:
        """The largest mean KL divergence to the model that is still right, in nats per token."""
        return 0.02

    def quantize(self, model: Artifact, calibration: Iterable[str], out: Path) -> Facts:
        """Write the quantized weights of a full model to `out`, as safetensors.

        Args:
            model: A model; an adapter has been folded into its base.
            calibration: Texts as the model is shown them; none where the recipe has no data.
            out: Where the files go; config and tokenizer are written by who asks.

        Returns:
            What the manifest should say: ``quantization_config`` for ``config.json``, ``dtype`` of what is not
            quantized, ``layers``, how many are.
        """
        raise NotImplementedError


class Exporter(Implementation[C]):
    """Kind ``exporter``: a model as files for the program that will serve it."""

    context: StageContext
    serves: ClassVar[bool] = False
    """Whether its program has its own server, see `listen`."""

    def export(self, model: Artifact) -> Facts:
        """Write the files to ``self.context.out``, check them in the real program, return the facts."""
        raise NotImplementedError

    def open(self, export: Artifact, variant: str | None) -> AbstractContextManager[Generator[Any]]:
        """Load an export in the program it is made for, to be asked there.

        Args:
            export: An artifact that `export` made.
            variant: Which of its files; by default the last.
        """
        raise NotImplementedError

    def listen(self, export: Artifact, variant: str | None, port: int) -> AbstractContextManager[str]:
        """Start the program's own server on 127.0.0.1, and give its address; only where `serves`."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class ToolEnvironment:
    """A tool with its own environment, because its pins would conflict with others.

    Plugins hand theirs over in the hook ``luthier_tool_environments``; ``luthier doctor --install NAME`` makes it.

    Attributes:
        name: What users and `luthier.api.Config.needs_tool` call it.
        summary: What it is for.
        packages: What is installed, one after the other: what must be found by the next comes first.
    """

    name: str
    summary: str
    packages: tuple[str, ...] = field(default=())
