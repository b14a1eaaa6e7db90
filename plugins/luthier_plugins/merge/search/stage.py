"""The stage ``search``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cmaes
import numpy as np
from luthier.api import Artifact, Facts, Metric, ModelError, Row, Score, Stage, StageContext
from luthier.artifacts.datasets import require_split
from luthier.artifacts.disk_space import check_disk_space
from luthier.merging.check import check
from luthier.merging.engine import Engine, Settings
from luthier.merging.jobs import Extras
from luthier.merging.layout import Inputs, lay_out
from luthier.merging.merge import merge_into, open_inputs
from luthier.merging.verify import Verifier
from luthier.merging.writer import size_of
from luthier.modeling.generate import ModelGenerator
from luthier.modeling.loading import fold, load_model, load_tokenizer
from luthier.modeling.samples import asked, samples_of
from luthier.modeling.scoring import scored
from luthier_plugins.merge.search.config import SearchConfig
from luthier_plugins.merge.search.memory import IntoModel, in_memory_if_they_fit
from pydantic import ValidationError
from scipy.stats import t as student

CHANCE = 0.025
"""The probability that a merge that is no better is called better."""
Trial = dict[str, Any]
Rows = Sequence[tuple[float, float]]
"""For each row how good it is, larger is better, and what it counts: summed losses and tokens, or a score and 1."""


class Search(Stage[SearchConfig]):
    """CMA-ES (Hansen and Ostermeier 2001) on the metric; every trial is kept, so that a stopped search can continue."""

    def run(self) -> Facts:
        context = self.context
        with Verifier(context.out) as verifier:
            with ExitStack() as stack:
                judge = stack.enter_context(closing(_Judge(self.config, context)))
                alone = [judge.of_model(artifact) for artifact in context.artifacts(self.config.models)]
                trials = self._trials(judge, context, stack)
                best = _best(trials)
                judge.merge(best["values"])
                final = judge.rows()
            facts = merge_into(self.config.merge(best["values"]), context, verifier)
        report = self._report(trials, best, alone, final, judge, context)
        (context.out / "search.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
        return {**facts, "search": report}

    def _trials(self, judge: _Judge, context: StageContext, stack: ExitStack) -> list[Trial]:
        judge.hold(context, stack)
        path = context.scratch / "trials.jsonl"
        known = _known(path)
        if known:
            context.log(f"continuing after {len(known)} trials")
        trials: list[Trial] = []
        with path.open("a", encoding="utf-8") as file:
            for point in self._points(trials, context.seed):
                context.progress(len(trials), self.config.trials, "trials")
                values = self.config.values_at(point)
                trial: Trial | None = known[len(trials)] if len(trials) < len(known) else None
                if trial is None or trial["values"] != values:
                    trial = _tried(judge, values)
                    file.write(json.dumps(trial) + "\n")
                    file.flush()
                trials.append(trial)
                if trial["score"] is not None:
                    context.metrics({"score": trial["score"]}, len(trials))
                else:
                    context.log(f"trial {len(trials)} has no score: {trial['problem']}")
        return trials

    def _points(self, trials: list[Trial], seed: int) -> Any:
        """The points to try; what was tried is read from `trials` between them."""
        bounds = np.array(self.config.bounds)
        width = bounds[:, 1] - bounds[:, 0]
        # CMA-ES wants two dimensions at least: a single parameter gets one beside it that nothing depends on.
        extra = max(0, 2 - len(bounds))
        size = len(bounds) + extra
        optimizer = cmaes.CMA(
            mean=np.full(size, 0.5),
            sigma=0.3,
            bounds=np.array([[0.0, 1.0]] * size),
            seed=seed or 1,
            population_size=self.config.population,
        )
        yield [float(value) for value in bounds.mean(axis=1)]
        while True:
            asked: list[Any] = []
            for _ in range(optimizer.population_size):
                if len(trials) >= self.config.trials:
                    return
                asked.append(optimizer.ask())
                yield [float(value) for value in bounds[:, 0] + asked[-1][: len(bounds)] * width]
            optimizer.tell([(point, _cost(trial)) for point, trial in zip(asked, trials[-len(asked) :], strict=True)])

    def _report(
        self,
        trials: list[Trial],
        best: Trial,
        alone: list[Trial],
        final: Rows,
        judge: _Judge,
        context: StageContext,
    ) -> Facts:
        labels = [str(artifact.manifest.get("stage")) for artifact in context.artifacts(self.config.models)]
        against = [
            {"model": label, "score": found["score"], **compared(final, found["rows"], len(trials))}
            for label, found in zip(labels, alone, strict=True)
        ]
        for item in against:
            if not item["beyond_noise"]:
                context.warn(f"the best merge is not better than {item['model']} alone beyond noise")
        return {
            "metric": self.config.metric.name,
            "goal": "highest" if judge.highest else "lowest",
            "best": {"values": best["values"], "score": best["score"]},
            "curve": [trial["score"] for trial in trials],
            "against": against,
        }


def _known(path: Path) -> list[Trial]:
    """The trials of a search that was stopped; a last line that was cut short is dropped."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return [json.loads(line) for line in lines]


def _tried(judge: _Judge, values: dict[str, float]) -> Trial:
    """One trial; what cannot be merged or computed has no score, and the search continues."""
    score, problem = math.nan, "the metric is not a finite number"
    try:
        judge.merge(values)
        score = judge.score()
    except (ModelError, ValidationError) as error:
        problem = str(error)
    if not math.isfinite(score):
        return {"values": values, "score": None, "merit": None, "problem": problem}
    return {"values": values, "score": score, "merit": score if judge.highest else -score}


def _cost(trial: Trial) -> float:
    return math.inf if trial["merit"] is None else -trial["merit"]


def _best(trials: Sequence[Trial]) -> Trial:
    """The first of the best trials.

    Raises:
        ModelError: none has a score.
    """
    best = min(trials, key=_cost)
    if best["merit"] is None:
        raise ModelError(
            f"none of {len(trials)} merges has a score: {best['problem']}",
            hint="do the models themselves run? try other ranges",
        )
    return best


def compared(best: Rows, other: Rows, trials: int) -> Facts:
    """By how much a merge is better than a model, by row and token, and whether that is more than noise.

    The difference is that of the two means over all tokens (or rows), its error that of a ratio of sums over rows
    (Cochran 1977, "Sampling Techniques", section 2.11). The best of many trials is better by luck alone: it has to be
    better at a level of `CHANCE` / trials (Bonferroni), by Student's t.

    Args:
        best: The merge's rows.
        other: The model's, the same ones.
        trials: How many merges the best one was chosen from.
    """
    # Rows that have a value for one of them alone cannot be compared.
    pairs = [(mine, theirs) for mine, theirs in zip(best, other, strict=True) if mine[1] and theirs[1]]
    if not pairs:
        return {"difference": None, "standard_error": None, "beyond_noise": False}
    weights = np.array([mine[1] for mine, _ in pairs], dtype=np.float64)
    differences = np.array([mine[0] - theirs[0] for mine, theirs in pairs], dtype=np.float64)
    total, count = float(weights.sum()), len(weights)
    mean = float(differences.sum()) / total
    if count < 2 or not math.isfinite(mean):
        return {"difference": mean if math.isfinite(mean) else None, "standard_error": None, "beyond_noise": False}
    spread = float(np.square(differences - mean * weights).sum()) * count / (count - 1)
    error = math.sqrt(spread) / total
    level = CHANCE / max(1, trials)
    # Where all rows differ by the same there is no spread to judge by: each could be better or worse.
    alike = error == 0 and mean > 0 and 0.5**count <= level
    beyond = alike or (error > 0 and mean > float(student.ppf(1 - level, count - 1)) * error)
    return {"difference": mean, "standard_error": error, "beyond_noise": beyond}


class _Judge:
    """Measures merges on the validation rows, with one loaded model whose parameters are replaced."""

    def __init__(self, config: SearchConfig, context: StageContext) -> None:
        self.config = config
        self.metric: Metric[Any] = context.build(config.metric)
        self.highest = self.metric.higher_is_better
        if self.metric.needs.baseline:
            raise ModelError(f"{config.metric.name} compares with another model, and a search has none")
        self._data: list[Row] = require_split(context.artifact(self.config.data), "validation")
        self._context = context
        self._lead = context.artifact(self.config.base) if config.base else context.artifacts(self.config.models)[0]
        self._tokenizer = load_tokenizer(self._lead)
        self._model: Any = fold(load_model(self._lead))
        self._extras: Extras | None = None

    def close(self) -> None:
        """Close what the method has prepared."""
        if self._extras is not None:
            self._extras.close()

    def hold(self, context: StageContext, stack: ExitStack) -> None:
        """Open the inputs, in memory where they fit."""
        base = context.artifact(self.config.base) if self.config.base else None
        largest = self.config.merge(self.config.values_at([bound[1] for bound in self.config.bounds]))
        opened = open_inputs(context.artifacts(self.config.models), base, context, stack, partial(check, largest))
        check(largest, opened)
        # What does not fit the loaded model or the disk is reported before anything is tried.
        tensors = lay_out(largest, opened, context.seed, self.config.dtype).tensors
        IntoModel(self._model, tensors)
        check_disk_space(context.out, size_of(tensors), "the merged model")
        held = in_memory_if_they_fit([*opened.models, *([opened.base] if opened.base else [])])
        count = len(opened.models)
        self._inputs = Inputs(held[:count], held[count] if opened.base else None)
        method = context.build(self.config.method)
        self._extras = Extras(method.prepare(context.artifacts(self.config.models)))

    def merge(self, values: dict[str, float]) -> None:
        """Put the merge with these values into the model."""
        config = self.config.merge(values)
        layout = lay_out(config, self._inputs, self._context.seed, config.dtype)
        assert self._extras is not None, "the inputs are held before they are merged"
        jobs = [replace(job, extras=self._extras.of(job.parameter.name)) for job in layout.jobs]
        target: Any = IntoModel(self._model, layout.tensors)
        workers = Settings(len(os.sched_getaffinity(0)))
        Engine(self._context.build(config.method), target, workers, lambda done, total: None).run(jobs)

    def score(self) -> float:
        """The metric of the model as it is."""
        return self._scored(self._model).value

    def rows(self) -> Rows:
        """How good each row is."""
        return self._by_row(self._scored(self._model))

    def of_model(self, artifact: Artifact) -> Trial:
        """The score of one of the inputs, and its rows."""
        score = self._scored(fold(load_model(artifact)))
        return {"score": score.value, "rows": self._by_row(score)}

    def _scored(self, model: Any) -> Score:
        need, stops = self.metric.needs, self._lead.facts["stop_token_ids"]
        generator = ModelGenerator(model, self._tokenizer, stops, date=self._context.date)
        answers = asked(generator.generate, self._data, [need], self.config.max_new_tokens, self._context.seed)
        folder = self._context.scratch / "distributions"
        found = scored(model, generator.encoder, self._data, [need], folder)
        return self.metric.score(samples_of(self._data, need, answers, found, generator.encoder.thinking), None)

    def _by_row(self, score: Score) -> Rows:
        """Larger is better: what counts less is turned round."""
        sign = 1.0 if self.highest else -1.0
        if len(score.by_row) != len(self._data):
            raise ModelError(
                f"the metric {self.config.metric.name} gave {len(score.by_row)} values for {len(self._data)} rows",
                hint="report this to its author",
            )
        weights = [1.0] * len(score.by_row) if score.weights is None else score.weights
        return [
            (0.0, 0.0) if value is None else (sign * value * weight, weight)
            for value, weight in zip(score.by_row, weights, strict=True)
        ]
