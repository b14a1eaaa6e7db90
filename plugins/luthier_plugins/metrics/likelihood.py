"""The metrics of a model's probabilities: ``multiple_choice``, ``token_accuracy``, ``agreement``, ``kl``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from luthier.api import Choice, Choices, DataError, Metric, Needs, Sample, Score
from luthier_plugins.metrics.config import AgreementConfig, KlConfig, MultipleChoiceConfig, TokenAccuracyConfig

STRETCH = 64
"""Tokens whose distributions are held at once."""


class MultipleChoice(Metric[MultipleChoiceConfig]):
    """The share of rows whose reference is the answer, of those to choose among, that the model takes for the
    likeliest, from 0 to 1. Of equal ones the first counts."""

    higher_is_better: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return Needs(choices=Choices(self.config.column, tuple(self.config.choices)))

    def score(self, samples: Sequence[Sample], baseline: Sequence[Sample] | None) -> Score:
        rows: list[float | None] = []
        for sample in samples:
            if sample.reference not in [choice.text for choice in sample.choices]:
                raise DataError(
                    f"the reference {sample.reference[:80]!r} is none of the answers to choose among",
                    hint="the metric 'multiple_choice' compares texts: list the reference among them, as it is",
                )
            rows.append(float(max(sample.choices, key=self._likelihood).text == sample.reference))
        return _mean(rows, [1.0] * len(rows), weighted=False)

    def _likelihood(self, choice: Choice) -> float:
        units = {"none": 1, "token": len(choice.logps), "byte": len(choice.text.encode("utf-8", "surrogatepass"))}
        return sum(choice.logps) / max(1, units[self.config.normalize])


class TokenAccuracy(Metric[TokenAccuracyConfig]):
    """The share of the tokens of references, stop tokens included, that are the model's likeliest there, from 0 to
    1."""

    higher_is_better: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return Needs(token_logps=True)

    def score(self, samples: Sequence[Sample], baseline: Sequence[Sample] | None) -> Score:
        right = [sum(map(int.__eq__, item.likeliest, item.targets)) for item in samples]
        counts = [len(item.targets) for item in samples]
        return _mean([hits / count if count else None for hits, count in zip(right, counts, strict=True)], counts)


class Agreement(Metric[AgreementConfig]):
    """The share of the tokens of references of which both models have the same likeliest one, from 0 to 1."""

    higher_is_better: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return Needs(token_logps=True, baseline=True)

    def score(self, samples: Sequence[Sample], baseline: Sequence[Sample] | None) -> Score:
        pairs = _paired("agreement", samples, baseline)
        counts = [len(mine.targets) for mine, _ in pairs]
        same = [sum(map(int.__eq__, mine.likeliest, theirs.likeliest)) for mine, theirs in pairs]
        return _mean([hits / count if count else None for hits, count in zip(same, counts, strict=True)], counts)


class Kl(Metric[KlConfig]):
    """The mean over tokens of the Kullback-Leibler divergence of the model's distribution from the other's:
    sum of p (log p - log q), q the model's, in nats."""

    higher_is_better: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        return Needs(distributions=True, baseline=True)

    def score(self, samples: Sequence[Sample], baseline: Sequence[Sample] | None) -> Score:
        rows: list[float | None] = []
        counts: list[int] = []
        for mine, theirs in _paired("kl", samples, baseline):
            assert mine.distribution is not None, "they were asked for"
            assert theirs.distribution is not None, "they were asked for"
            p, q = theirs.distribution(), mine.distribution()
            if p.shape != q.shape:
                raise DataError(
                    f"the vocabularies have {p.shape[1]} and {q.shape[1]} tokens: 'kl' compares the same ones"
                )
            counts.append(len(p))
            total = sum(_divergence(p[at : at + STRETCH], q[at : at + STRETCH]) for at in range(0, len(p), STRETCH))
            # Rounding may leave a hair below 0 of what is equal.
            rows.append(max(0.0, total / len(p)) if len(p) else None)
        return _mean(rows, counts)


def _divergence(p: np.ndarray[Any, Any], q: np.ndarray[Any, Any]) -> float:
    """The divergences of some tokens together; a token of probability 0 adds nothing, and its logarithm is no
    number."""
    p = p.astype(np.float64)
    return float(np.where(p > -np.inf, np.exp(p) * (p - q), 0.0).sum())


def _paired(name: str, samples: Sequence[Sample], baseline: Sequence[Sample] | None) -> list[tuple[Sample, Sample]]:
    """What both models make of the same tokens.

    Raises:
        DataError: their tokens are not the same.
    """
    assert baseline is not None, "it was asked for"
    pairs = list(zip(samples, baseline, strict=True))
    for mine, theirs in pairs:
        if mine.targets != theirs.targets:
            raise DataError(
                f"the metric '{name}' compares models token by token, and theirs are not the same: their tokenizers or "
                "chat templates differ",
                hint="take perplexity with `per: byte`, or compare their answers",
            )
    return pairs


def _mean(rows: list[float | None], counts: Sequence[float], *, weighted: bool = True) -> Score:
    """The mean over rows, each as often as it has tokens."""
    total = sum(counts)
    value = sum((row or 0.0) * count for row, count in zip(rows, counts, strict=True)) / total if total else 0.0
    return Score(value, rows, counts if weighted else None)
