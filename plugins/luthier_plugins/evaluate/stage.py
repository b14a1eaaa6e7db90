"""Measures models on held-out rows."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from luthier.api import Artifact, Asks, DataError, Facts, Metric, Row, Score, Stage, Use
from luthier.artifacts.datasets import require_split
from luthier.artifacts.rows import prompt_of
from luthier_plugins.evaluate.certainty import SAME, differences, intervals
from luthier_plugins.evaluate.config import KEEP, EvaluateConfig
from luthier_plugins.evaluate.measuring import Measured, Models, Task


class Evaluate(Stage[EvaluateConfig]):
    """The stage ``evaluate``."""

    def run(self) -> Facts:
        artifacts = [self.context.artifact(self.config.model), *self.context.artifacts(self.config.against)]
        models = Models(self.config, self.context)
        tasks: list[Task] = []
        for title, rows, metrics in self._wanted():
            _refuse_exports(artifacts, metrics)
            places = models.usable(rows, artifacts, metrics)
            tasks.append(Task(title, [rows[place] for place in places], places, metrics))
        roles = ["model", *(f"against-{place}" for place in range(1, len(artifacts)))]
        found = [models.measured(role, item, tasks) for role, item in zip(roles, artifacts, strict=True)]
        baseline = found[1] if len(found) > 1 else None
        column = self.config.clusters
        clusters: dict[str, Sequence[Hashable]] = {}
        if column is not None:
            clusters = {name: [str(row[column]) for row in tasks[0].rows] for name in tasks[0].metrics}
        better = {name: metric.higher_is_better for task in tasks for name, metric in task.metrics.items()}
        scores = [self._scores(tasks, model, baseline) for model in found]
        facts_of = [
            {**self._facts(role, model, baseline, tasks, some), "intervals": intervals(some, clusters)}
            for role, model, some in zip(roles, found, scores, strict=True)
        ]
        # What compares with the first other model anyway says nothing of that model alone.
        relative = {name for task in tasks for name, metric in task.metrics.items() if metric.needs.baseline}
        for place, (other, some) in enumerate(zip(facts_of[1:], scores[1:], strict=True)):
            theirs = {name: score for name, score in some.items() if name not in relative}
            if place == 0:
                theirs |= {name: _alike(score) for name, score in scores[0].items() if score.neutral is not None}
            other["difference"] = differences(scores[0], theirs, better, clusters)
        facts: Facts = {**facts_of[0], "against": facts_of[1:], "higher_is_better": better}
        facts["table"] = _table(facts)
        (self.context.out / "report.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
        return facts

    def _wanted(self) -> list[tuple[str, list[Row], dict[str, Metric[Any]]]]:
        """What is measured on which rows."""
        wanted = [("", self._rows(), self._metrics(self.config.metrics, self.config.names))]
        if self.config.keep is not None:
            rows = _asking(require_split(self.context.artifact(self.config.keep), "test"))
            names = [f"{KEEP}{name}" for name in self.config.kept_names]
            wanted.append(("keep-", rows, self._metrics(self.config.keep_metrics, names)))
        return wanted

    def _metrics(self, uses: Sequence[Use], names: Sequence[str]) -> dict[str, Metric[Any]]:
        made: dict[str, Metric[Any]] = {}
        for use, name in zip(uses, names, strict=True):
            made[name] = self.context.build(use)
            if made[name].needs.baseline and not self.config.against:
                raise DataError(f"the metric '{name}' compares with another model", hint="name one under `against`")
            judge = use.config.generator if isinstance(use.config, Asks) else None
            judging = None if judge is None else getattr(judge.config, "model", None)
            if judging in [self.config.model, *self.config.against]:
                self.context.warn(
                    f"{judging} judges its own answers in '{name}': models prefer what they would say themselves"
                )
        return made

    def _rows(self) -> list[Row]:
        rows = require_split(self.context.artifact(self.config.data), "test")
        for column in (self.config.by, self.config.clusters):
            if column is not None and column not in rows[0]:
                raise DataError(f"the data has no column '{column}'", hint="keep it with `keep` in the data stage")
        return _asking(rows)

    def _scores(self, tasks: Sequence[Task], model: Measured, baseline: Measured | None) -> dict[str, Score]:
        """All metrics of one model, over all rows."""
        return {
            name: self._score(number, name, tasks, model, baseline)
            for number, task in enumerate(tasks)
            for name in task.metrics
        }

    def _score(
        self,
        number: int,
        name: str,
        tasks: Sequence[Task],
        model: Measured,
        baseline: Measured | None,
        value: str | None = None,
    ) -> Score:
        """A metric over all rows, or over those of a slice."""
        metric, rows = tasks[number].metrics[name], tasks[number].rows
        places = [place for place, row in enumerate(rows) if value is None or str(row[str(self.config.by)]) == value]
        compared = baseline.samples[number][name] if baseline is not None and metric.needs.baseline else None
        return metric.score(
            [model.samples[number][name][place] for place in places],
            None if compared is None else [compared[place] for place in places],
        )

    def _sliced(
        self,
        name: str,
        score: Score,
        tasks: Sequence[Task],
        model: Measured,
        baseline: Measured | None,
        value: str,
    ) -> float | None:
        """A metric over the rows of a slice: from what is known of its rows, for it may have asked a judge of each."""
        places = [place for place, row in enumerate(tasks[0].rows) if str(row[str(self.config.by)]) == value]
        try:
            return _part(score, places)
        except LookupError:
            return self._score(0, name, tasks, model, baseline, value).value

    def _facts(
        self,
        role: str,
        model: Measured,
        baseline: Measured | None,
        tasks: Sequence[Task],
        scores: Mapping[str, Score],
    ) -> Facts:
        """The scores of one model, and files with what it answered and what each row contributed."""
        values = {name: score.value for name, score in scores.items()}
        artifact = model.artifact
        label = "" if role == "model" else f"{artifact.manifest['stage']}/"
        self.context.metrics({f"{label}{name}": value for name, value in values.items()}, 0)
        for number, task in enumerate(tasks):
            self._write_rows(role, number, task, model, scores)
        facts: Facts = {
            "stage": artifact.manifest["stage"],
            "key": artifact.key,
            "rows": len(tasks[0].rows),
            # First of all that is told by metric: who looks for a metric's name finds its value.
            "scores": values,
            "rows_by_metric": {name: len(task.rows) for task in tasks for name in task.metrics},
            "prompt": model.prompt,
        }
        facts["answers"] = {name: count for name, count in model.answers.items() if count}
        facts["unread"] = {name: score.unread for name, score in scores.items() if score.unread}
        facts["counts"] = {name: dict(score.counts) for name, score in scores.items() if score.counts}
        if artifact.kind == "export" and self.config.variant is not None:
            facts["variant"] = self.config.variant
        if self.config.by is not None:
            facts["slices"] = {
                value: {
                    name: self._sliced(name, scores[name], tasks, model, baseline, value) for name in tasks[0].metrics
                }
                for value in sorted({str(row[self.config.by]) for row in tasks[0].rows})
            }
        return facts

    def _write_rows(self, role: str, number: int, task: Task, model: Measured, scores: Mapping[str, Score]) -> None:
        for name in task.metrics:
            if len(scores[name].by_row) != len(task.rows):
                raise DataError(
                    f"the metric '{name}' gave {len(scores[name].by_row)} values for {len(task.rows)} rows",
                    hint="report this to its author",
                )
        lines: list[str] = []
        for place in range(len(task.rows)):
            samples = {name: found[place] for name, found in model.samples[number].items()}
            first = next(iter(samples.values()))
            about = {
                # Its number in the split, also where rows before it could not be asked.
                "row": task.places[place] + 1,
                "prompt": first.prompt,
                "reference": first.reference,
                "answers": {
                    name: [item.text for item in sample.answers] for name, sample in samples.items() if sample.answers
                },
                "scores": {name: scores[name].by_row[place] for name in task.metrics},
            }
            lines.append(json.dumps(about, ensure_ascii=False))
        (self.context.out / f"{task.title}{role}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _refuse_exports(artifacts: Sequence[Artifact], metrics: Mapping[str, Metric[Any]]) -> None:
    """Refuse to ask exports for probabilities, before anything is asked.

    Raises:
        DataError: one would be.
    """
    scoring = [name for name, metric in metrics.items() if metric.needs.probabilities]
    exports = [str(artifact.manifest["stage"]) for artifact in artifacts if artifact.kind == "export"]
    if scoring and exports:
        raise DataError(
            f"{exports[0]} is an export, which answers, but gives no probabilities, which {', '.join(scoring)} needs",
            hint="measure that on the model it was made from",
        )


def _alike(score: Score) -> Score:
    """What a metric that compares two models would give to two that are alike."""
    assert score.neutral is not None, "only those are asked"
    return Score(score.neutral, [score.neutral] * len(score.by_row))


def _part(score: Score, places: Sequence[int]) -> float | None:
    """A metric over some of the rows; None where it says nothing of any of them.

    Raises:
        LookupError: its value cannot be told from what it says of rows.
    """
    if score.resampled is not None:
        return score.resampled(np.asarray(places))
    if not score.is_mean or abs(_mean(score, range(len(score.by_row))) - score.value) > SAME * max(1, abs(score.value)):
        raise LookupError("the value is no mean of its rows")
    found = _mean(score, places)
    return None if math.isnan(found) else found


def _mean(score: Score, places: Iterable[int]) -> float:
    """The mean of rows, as it makes a metric's value; NaN where nothing is said of any."""
    known = [
        (value, 1.0 if score.weights is None else score.weights[place])
        for place in places
        if (value := score.by_row[place]) is not None
    ]
    total = sum(weight for _, weight in known)
    if not total:
        return math.nan
    mean = sum(value * weight for value, weight in known) / total
    return mean if score.of_mean is None else score.of_mean(mean)


def _asking(rows: list[Row]) -> list[Row]:
    """Rows, each of which asks something.

    Raises:
        DataError: some do not.
    """
    alone = sum(not prompt_of(row) for row in rows)
    if alone:
        raise DataError(f"{alone} rows of the split 'test' have nothing but an answer", hint="a prompt comes first")
    return rows


def _table(facts: Facts) -> Facts:
    """What a run's summary shows of a report: a row for each model, a column for each metric and slice."""
    names: list[str] = list(facts["scores"])
    slices: Mapping[str, Mapping[str, float]] = facts.get("slices", {})
    sliced = [(value, name) for value, scores in slices.items() for name in scores]
    columns = [*names, *(f"{value} {name}" for value, name in sliced)]
    rows = [
        [
            _label(found),
            *(found["scores"][name] for name in names),
            *(found["slices"][value][name] for value, name in sliced),
        ]
        for found in [facts, *facts["against"]]
    ]
    return {"columns": columns, "rows": rows}


def _label(found: Facts) -> str:
    return f"{found['stage']} {found['variant']}" if found.get("variant") else str(found["stage"])
