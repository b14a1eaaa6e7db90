"""Evidence that a stage trained what it says: gradients, changes, speed, and that what it stored is what it trained."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.api.artifact import Artifact
from luthier.api.errors import ModelError
from luthier.api.stages import Facts
from luthier.artifacts.json_files import read_json, write_json
from luthier.modeling.loading import load_adapter, load_folder, model_folder
from luthier.modeling.text import IGNORED, Encoded
from luthier.training.batches import evaluating
from luthier.training.divergence import Watch
from luthier.training.encoding import EncodedRow
from luthier.training.experts import rows_of
from luthier.training.flops import Arithmetic, most_of

SHOWN_ROWS = 2
"""Rows of the first step that are shown with what is trained of them."""
SHOWN_CHARACTERS = 2000
"""Characters of each that are shown."""
PROBED = 64
"""Tokens of the row with which what is stored is compared with what was trained."""
SAME = 2e-3
"""How much of the largest logit rounding may move one."""
DESCRIBED = 160
"""Characters of a row that messages show."""
LISTED = 8
"""Names that a message lists."""
STATE = "receipt.json"


class Receipt:
    """Watches training.

    Args:
        model: The model, before its first step.
        scratch: A folder that survives a crash: what was seen before one counts.

    Attributes:
        watch: Follows the loss.
    """

    def __init__(self, model: Any, scratch: Path) -> None:
        self._file = scratch / STATE
        self._model = model
        # Of each tensor that is trained, or of each expert in it, whether a gradient came to it.
        self._reached: dict[str, Tensor] = {
            name: torch.zeros(len(parameter) if parameter.ndim == 3 else 1, dtype=torch.bool)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        # Of these alone: no gradient is to come to other experts.
        self._some = {name: rows for name, item in model.named_parameters() if (rows := rows_of(item)) is not None}
        self._waiting = set(self._reached)
        self._arithmetic = Arithmetic(model)
        self._seconds = 0.0
        self._operations = 0.0
        self.watch = Watch()
        self._tokens = 0
        self._steps = 0
        if self._file.exists():
            known = read_json(self._file)
            self.watch = Watch(known.get("began", ()))
            for name, values in known["reached"].items():
                if name in self._reached and len(values) == len(self._reached[name]):
                    self._reached[name] |= torch.tensor(values)
            self._waiting = {name for name in self._reached if not self._complete(name)}

    @contextmanager
    def step(self, rows: Sequence[EncodedRow]) -> Iterator[None]:
        """Around the gradients of one step.

        Raises:
            ModelError: no gradient came to any weight that is trained.
        """
        started = time.perf_counter()
        yield
        self._look()
        self._seconds += time.perf_counter() - started
        self._tokens += sum(len(item.input_ids) for row in rows for item in row.completions)
        self._operations += self._arithmetic.of(rows)
        self._steps += 1
        if not any(bool(seen.any()) for seen in self._reached.values()):
            raise ModelError(
                "no gradient reaches any weight that is trained: nothing would be learned",
                hint="are all of the weights that `train` or the adapter names behind something frozen, or the loss "
                "constant?",
            )

    def speed(self) -> float | None:
        """Tokens per second so far."""
        return self._tokens / self._seconds if self._seconds else None

    def _look(self) -> None:
        if not self._waiting:
            return
        parameters = dict(self._model.named_parameters())
        for name in list(self._waiting):
            gradient = parameters[name].grad
            if gradient is None:
                continue
            seen = self._reached[name]
            seen |= (gradient.detach().flatten(1).any(1) if gradient.ndim == 3 else gradient.detach().any()[None]).cpu()
            if self._complete(name):
                self._waiting.discard(name)

    def _complete(self, name: str) -> bool:
        seen = self._reached[name]
        return bool((seen[self._some[name]] if name in self._some else seen).all())

    def keep(self) -> None:
        """Write down what was seen, beside a checkpoint."""
        reached = {name: seen.tolist() for name, seen in self._reached.items()}
        write_json(self._file, {"reached": reached, "began": self.watch.began})

    def without_gradient(self) -> list[str]:
        """The tensors that no gradient ever came to."""
        return sorted(name for name, seen in self._reached.items() if not bool(seen.any()))

    def _trained_rows(self, name: str) -> list[int]:
        return self._some[name].tolist() if name in self._some else list(range(len(self._reached[name])))

    def facts(self) -> Facts:
        """What a manifest says: which weights were trained, what reached them, and how fast."""
        sizes = {name: parameter.numel() for name, parameter in self._model.named_parameters()}
        shares = {name: len(rows) / len(self._reached[name]) for name, rows in self._some.items()}
        count = round(sum(sizes[name] * shares.get(name, 1.0) for name in self._reached))
        experts = {
            name: [place for place in self._trained_rows(name) if not bool(seen[place])]
            for name, seen in self._reached.items()
            if len(seen) > 1 and not self._complete(name)
        }
        found: Facts = {
            "parameters": count,
            "share": count / max(1, sum(sizes.values())),
            "tensors": dict(sorted(Counter(map(kind_of, self._reached)).items())),
            "without_gradient": self.without_gradient(),
            "peak_memory": peak_memory(),
        }
        if experts:
            found["experts_without_gradient"] = experts
        if self._seconds:
            found["tokens_per_second"] = self.speed()
            most = most_of(next(self._model.parameters()).device)
            if most is not None:
                found["mfu"] = self._operations / self._seconds / most
        return found


def kind_of(name: str) -> str:
    """A weight's name without the number of its block."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def peak_memory() -> int:
    """The most bytes that the process held so far: of the GPU where there is one."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    # Bytes on macOS, kibibytes elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def shown_rows(rows: Sequence[EncodedRow], tokenizer: Any) -> list[list[dict[str, Any]]]:
    """The beginnings of a few rows as the model sees them: texts in a row, each with whether it is trained."""
    some = [item for row in rows[:SHOWN_ROWS] for item in row.completions][: 2 * SHOWN_ROWS]
    found: list[list[dict[str, Any]]] = []
    for item in some:
        parts: list[dict[str, Any]] = []
        room = SHOWN_CHARACTERS
        for ids, is_trained in parts_of(item):
            if room > 0:
                text = text_of(tokenizer, ids)[:room]
                parts.append({"text": text, "trained": is_trained})
                room -= len(text)
        found.append(parts)
    return found


def parts_of(item: Encoded) -> Iterator[tuple[list[int], bool]]:
    """The runs of tokens of a sequence that are trained, and those that are not, in their order."""
    trained = [label != IGNORED for label in item.labels]
    start = 0
    for end in range(1, len(trained) + 1):
        if end == len(trained) or trained[end] != trained[start]:
            yield item.input_ids[start:end], trained[start]
            start = end


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as text, special ones included."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def described(tokenizer: Any, row: EncodedRow) -> str:
    """The beginning of a row, as text in quotes."""
    text: str = tokenizer.decode(row.completions[0].input_ids[:PROBED], skip_special_tokens=False)
    return repr(text[:DESCRIBED] + ("..." if len(text) > DESCRIBED else ""))


def probe_of(rows: Sequence[EncodedRow]) -> Tensor:
    """Some tokens to compare logits on, shape (1, tokens)."""
    return torch.tensor([rows[0].completions[0].input_ids[:PROBED]])


def logits_of(model: Any, probe: Tensor) -> Tensor:
    """The model's logits of a probe, float32 on the CPU, shape (tokens, vocabulary)."""
    with evaluating(model), torch.no_grad():
        return model(input_ids=probe.to(next(model.parameters()).device)).logits[0].float().cpu()


def check_reloads(
    out: Path, source: Artifact, options: dict[str, Any], probe: Tensor, right: Tensor, *, adapter: bool
) -> float:
    """Load what was stored, and compare it with what was trained.

    Args:
        out: The folder with the model or adapter.
        source: What it was made from.
        options: How an adapter's base is loaded.
        probe: Tokens, see `probe_of`.
        right: The trained model's logits of them.
        adapter: Whether an adapter was stored.

    Returns:
        By how much logits differ at most, as a share of the largest.

    Raises:
        ModelError: by more than rounding.
    """
    model = load_adapter(out, model_folder(source), options) if adapter else load_folder(out)
    difference = float((logits_of(model, probe) - right).abs().max() / right.abs().max().clamp(min=1e-9))
    if not difference <= SAME:
        raise ModelError(
            f"what was stored is not what was trained: loaded again, its scores of tokens differ by {difference:.3g} "
            "of the largest",
            hint="report this, with the recipe: the checkpoint is kept",
        )
    return difference
