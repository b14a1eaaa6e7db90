"""Proves in llama.cpp that a file reads, stops and predicts like the model it came from."""

from __future__ import annotations

import datetime
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle, islice
from typing import Any

import numpy as np
from luthier.api import Facts, Message, ModelError
from luthier.modeling.compare import CORPUS
from luthier.modeling.streamed import Streamed
from luthier.modeling.text import render
from luthier_plugins.gguf.server import LlamaServer
from luthier_plugins.gguf.tokenizer import NormalForm

CONVERSATIONS: tuple[list[Message], ...] = (
    [Message(role="user", content="Hello, who are you?")],
    [
        Message(role="user", content="First question:\n- one\n- two"),
        Message(role="assistant", content="An answer, with “quotes”."),
        Message(role="user", content="  And a second one?  "),
    ],
)
POSITIONS = 48
"""About how many next-token distributions are compared, ..."""
PROBABILITIES = 4_000_000
"""... unless these are more numbers: each comes as JSON, a large vocabulary's in a second."""
OWN = 8
"""Texts of the recipe's own among those whose distributions are compared, ..."""
OWN_TOKENS = 128
"""... and how much of each."""
LIKELY, IMPOSSIBLE = 8192, 1e-5
"""So many tokens are asked for where the others together have less than this probability."""
UNSEEN = 1e-3
"""The probability that tokens may have together which llama.cpp does not report."""
WINDOW = 1024
"""Tokens of a sliding window, at most, for which a text is read that is longer, ..."""
BEHIND = 64
"""... by so many."""


FINER = (
    "choose a finer type, set `imatrix: true` with `calibration` data that resembles real use, keep sensitive tensors "
    "finer with `overrides`, or raise `max_kl` if this loss is what you want"
)


class UnlikeError(ModelError):
    """A file predicts otherwise than the model: because of rounding, or because llama.cpp computes it otherwise."""


@dataclass(frozen=True, slots=True)
class Expected:
    """How the original reads and thinks: computed once, compared with every file."""

    texts: dict[str, list[int]]
    prompts: list[str]
    dated_prompts: list[str]
    prompt_ids: dict[str, list[int]]
    prefixes: list[list[int]]
    log_probabilities: list[np.ndarray]
    stop_ids: list[int]
    endings: list[list[int]] = field(default_factory=list[list[int]])
    """Prompts with their whole answers, behind which the model stops, on its own."""

    @property
    def longest(self) -> int:
        """The tokens of the longest text, and of what is said behind it."""
        return max(map(len, [*self.prefixes, *self.endings])) + 1


def expected_of(
    model: Streamed,
    tokenizer: Any,
    stop_ids: Sequence[int],
    own: Sequence[str] = (),
    *,
    spaced: bool = True,
    forms: Sequence[NormalForm] = (),
    length: int | None = None,
    answered: Sequence[list[int]] = (),
) -> Expected:
    """What a GGUF file of this model has to agree with.

    Args:
        model: The model in full precision.
        stop_ids: The tokens it was trained to stop on.
        own: Texts of the recipe that have to become the same tokens, as the model is shown them.
        spaced: Whether texts that begin with a space have to become the same tokens as well.
        forms: The normal forms of Unicode that the tokenizer brings texts into: the texts are compared in them.
        length: The longest text, in tokens, that the file promises to be right for; by default the model's sliding
            window, where it has one.
        answered: Conversations up to the token that ends their last answer: where the model stops, the file has to.
    """
    own = [_normal(text, forms) for text in own]
    texts = {
        text: ids_of(tokenizer, text)
        for text in (_normal(text, forms) for text in CORPUS)
        if spaced or not text[0].isspace()
    }
    # A plain base model has no template: there is no prompt to compare, only texts.
    conversations = CONVERSATIONS if tokenizer.chat_template is not None else ()
    prompts = [render(tokenizer, messages, open_turn=True) for messages in conversations]
    # llama.cpp gives templates such as Llama 3's today's date, where transformers leaves their fixed one.
    today = datetime.date.today()
    dated = [
        render(tokenizer, messages, open_turn=True, date=today, date_string=today.strftime("%d %b %Y"))
        for messages in conversations
    ]
    prompt_ids = {text: ids_of(tokenizer, text) for text in [*prompts, *own] if spaced or not text[0].isspace()}
    mine = [ids_of(tokenizer, text)[:OWN_TOKENS] for text in own[:OWN]]
    sequences = [prompt_ids[prompt] for prompt in prompts] + list(texts.values()) + mine
    config = model.config
    positions = min(POSITIONS, PROBABILITIES // config.vocab_size + 1)
    window: int | None = getattr(config, "sliding_window", None)
    longest: int = length or window or getattr(config, "max_position_embeddings", None) or 1 << 20
    # Of each text, the tokens behind which distributions are compared.
    compared = [
        range(min(len(ids), longest) - 1, 0, -max(1, len(ids) * len(sequences) // positions)) for ids in sequences
    ]
    if window and window < longest and window <= WINDOW:
        sequences.append(_long(sequences, min(window + BEHIND, longest)))
        compared.append(range(len(sequences[-1]) - 1, len(sequences[-1]) - 2, -1))
    answered = [ids for ids in answered if len(ids) < longest] if stop_ids else []
    rows: dict[int, list[np.ndarray]] = {}
    endings: list[list[int]] = []
    for number, logits in model.logits([*sequences, *answered]):
        if number < len(sequences):
            rows[number] = list(logits[list(compared[number])].log_softmax(-1).numpy())
        elif int(logits[-1].argmax()) in stop_ids:
            endings.append(answered[number - len(sequences)])
    prefixes = [sequences[number][: place + 1] for number in sorted(rows) for place in compared[number]]
    logs = [row for number in sorted(rows) for row in rows[number]]
    return Expected(texts, prompts, dated, prompt_ids, prefixes, logs, list(stop_ids), endings)


def _normal(text: str, forms: Sequence[NormalForm]) -> str:
    for form in forms:
        text = unicodedata.normalize(form, text)
    return text


def _long(sequences: Sequence[list[int]], length: int) -> list[int]:
    """So many tokens of the texts, again and again."""
    return list(islice(cycle(chain.from_iterable(sequences)), length))


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, special ones recognised and none added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check(server: LlamaServer, expected: Expected, largest_kl: float) -> Facts:
    """Compare a loaded file with the original.

    Returns:
        The facts ``kl`` (mean, in nats), ``top1`` (share of positions with the same best token),
        ``positions``, ``texts``, how many became the same tokens, and, where the model ends answers on its own,
        ``endings``: how many of them the file ends, and how many there are.

    Raises:
        ModelError: text becomes other ids, a prompt is rendered differently, a stop token does not stop, answers do
            not end, or the distributions are further apart than `largest_kl`.
    """
    where = str(server.file)
    for text, ids in {**expected.texts, **expected.prompt_ids}.items():
        if server.tokenize(text) != ids:
            raise ModelError(f"llama.cpp reads this text as other tokens than transformers: {text!r}", where=where)
    # Without a template there are no prompts to compare.
    conversations = CONVERSATIONS[: len(expected.prompts)]
    for messages, prompt, dated in zip(conversations, expected.prompts, expected.dated_prompts, strict=True):
        found = server.render(messages)
        if found not in (prompt, dated):
            raise ModelError(f"llama.cpp renders the chat template differently: {found!r}, not {prompt!r}", where=where)
    for messages, prompt, dated in zip(conversations, expected.prompts, expected.dated_prompts, strict=True):
        if prompt == dated and server.prompt_tokens(messages) != len(expected.prompt_ids[prompt]):
            raise ModelError(
                "llama.cpp puts another token in front of a conversation, or none where one belongs", where=where
            )
    for stop in expected.stop_ids:
        if not server.stops_on(stop, expected.prefixes[0]):
            raise ModelError(f"llama.cpp does not stop on the stop token {stop}", where=where)
    facts = _compare(server, expected, largest_kl)
    if not expected.endings:
        return facts
    ended = sum(server.ends(answered) for answered in expected.endings)
    if not ended:
        raise UnlikeError(
            f"the file does not stop: none of {len(expected.endings)} answers that the model ends end in llama.cpp",
            where=where,
            hint="choose a finer type, or keep the output layer finer with `overrides`",
        )
    return {**facts, "endings": [ended, len(expected.endings)]}


def _distribution(server: LlamaServer, ids: Sequence[int], right: np.ndarray, stop: int) -> np.ndarray:
    """What the file says next: of all tokens, or of the likely ones where the others are as good as impossible."""
    if len(right) > LIKELY:
        likely = np.partition(right, -LIKELY)[-LIKELY:]
        if 1 - float(np.exp(likely, dtype=np.float64).sum()) < IMPOSSIBLE:
            found = server.next_log_probabilities(ids, len(right), stop, most=LIKELY)
            if float(np.exp(right[~np.isfinite(found)]).sum()) < IMPOSSIBLE:
                return found
    return server.next_log_probabilities(ids, len(right), stop)


def _compare(server: LlamaServer, expected: Expected, largest_kl: float) -> Facts:
    divergences: list[float] = []
    same = 0
    stop = expected.stop_ids[0] if expected.stop_ids else 0
    for ids, right in zip(expected.prefixes, expected.log_probabilities, strict=True):
        found = _distribution(server, ids, right, stop)
        # A token that llama.cpp does not report has a probability that underflows: nothing to add.
        seen = np.isfinite(found)
        hidden = float(np.exp(right[~seen]).sum())
        apart = float((np.exp(right[seen]) * (right[seen] - found[seen])).sum())
        divergences.append(apart if hidden < UNSEEN else math.inf)
        same += int(found.argmax() == right.argmax())
    kl = float(np.mean(divergences))
    if not kl <= largest_kl:
        raise UnlikeError(
            f"the file does not behave like the model it came from: mean KL divergence {kl:.3g} nats, "
            f"at most {largest_kl:g} is expected",
            where=str(server.file),
            hint=FINER,
        )
    return {
        "kl": max(kl, 0.0),
        "top1": same / len(divergences),
        "positions": len(divergences),
        "texts": len(expected.texts) + len(expected.prompt_ids),
    }
