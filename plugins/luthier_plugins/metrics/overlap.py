"""The metrics that count what answer and reference have in common: ``f1``, ``bleu``, ``chrf``, ``rouge``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from luthier.api import Sample, Score
from luthier.artifacts.extras import needed
from luthier_plugins.metrics.answers import AnswerMetric, C, plain
from luthier_plugins.metrics.config import BleuConfig, ChrfConfig, F1Config, RougeConfig

EXTRA = "evaluation"
ARTICLES = re.compile(r"\b(a|an|the)\b")


class F1(AnswerMetric[F1Config]):
    """The mean over answers of the harmonic mean of precision and recall of words, as SQuAD's evaluation has it
    (Rajpurkar et al., arXiv 1606.05250), from 0 to 1."""

    def of(self, sample: Sample) -> float:
        said, right = (ARTICLES.sub(" ", plain(text.lower())).split() for text in (sample.answer, sample.reference))
        if not said or not right:
            return float(said == right)
        common = (Counter(said) & Counter(right)).total()
        return 2 * common / (len(said) + len(right))


class _Corpus(AnswerMetric[C]):
    """A score of all answers together by sacrebleu, from 0 to 100; each row contributes its own."""

    @cached_property
    def measure(self) -> Any:
        """sacrebleu's metric."""
        raise NotImplementedError

    @cached_property
    def row_measure(self) -> Any:
        """sacrebleu's metric for a row alone."""
        return self.measure

    def score(self, samples: Sequence[Sample], baseline: Sequence[Sample] | None) -> Score:
        pairs = [(item.answer, item.reference) for item in samples]
        whole = self.measure.corpus_score([said for said, _ in pairs], [[right for _, right in pairs]]).score
        rows = [float(self.row_measure.sentence_score(said, [right]).score) for said, right in pairs]
        # The counts that sacrebleu makes of each row: what its own bootstrap adds up.
        counts = np.asarray(
            self.measure._extract_corpus_statistics([said for said, _ in pairs], [[b for _, b in pairs]])
        )

        def resampled(places: np.ndarray[Any, Any]) -> float:
            return float(self.measure._compute_score_from_stats(counts[places].sum(axis=0).tolist()).score)

        return Score(float(whole), rows, is_mean=False, resampled=resampled)


class Bleu(_Corpus[BleuConfig]):
    """BLEU (Papineni et al., 2002)."""

    @cached_property
    def measure(self) -> Any:
        return self._bleu(effective_order=False)

    @cached_property
    def row_measure(self) -> Any:
        # A row may have fewer than four words, of which there are no runs of four.
        return self._bleu(effective_order=True)

    def _bleu(self, **options: Any) -> Any:
        about = {"tokenize": self.config.tokenize, "lowercase": self.config.lowercase}
        return needed("sacrebleu", "sacrebleu", EXTRA).BLEU(**about, **options)


class Chrf(_Corpus[ChrfConfig]):
    """chrF (Popović, 2015)."""

    @cached_property
    def measure(self) -> Any:
        return needed("sacrebleu", "sacrebleu", EXTRA).CHRF(word_order=self.config.word_order)


class Rouge(AnswerMetric[RougeConfig]):
    """The mean F of ROUGE (Lin, 2004), from 0 to 1."""

    @cached_property
    def _scorer(self) -> Any:
        module = needed("rouge_score.rouge_scorer", "rouge-score", EXTRA)
        return module.RougeScorer([self.config.type], use_stemmer=self.config.stemmer)

    def of(self, sample: Sample) -> float:
        return float(self._scorer.score(sample.reference, sample.answer)[self.config.type].fmeasure)
