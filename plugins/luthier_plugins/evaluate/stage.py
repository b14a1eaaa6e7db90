"""Measures models on held-out rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from luthier.api import Artifact, DataError, Facts, Metric, Row, Sample, Score, Stage, StoreError
from luthier.artifacts.datasets import require_split
from luthier.artifacts.models import positions_of
from luthier.artifacts.rows import prompt_of
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.generate import TransformersGenerator
from luthier.modeling.loading import load_tokenizer, model_folder
from luthier.modeling.samples import Asked, asked, measured, problem_of, samples_of
from luthier.modeling.thinking import USUAL, Thinking
from luthier.serving.asking import Asker
from luthier_plugins.evaluate.certainty import differences, intervals
from luthier_plugins.evaluate.config import EvaluateConfig, Marks


@dataclass(frozen=True, slots=True)
class _Measured:
    """One model: what metrics see of it, by their names."""

    artifact: Artifact
    samples: Mapping[str, Sequence[Sample]]
    answers: Mapping[str, int]
    """How many answers there are, and how many of them are no whole ones."""


class Evaluate(Stage[EvaluateConfig]):
    """The stage ``evaluate``."""

    def run(self) -> Facts:
        metrics: dict[str, Metric[Any]] = {}
        for use, name in zip(self.config.metrics, self.config.names, strict=True):
            metrics[name] = self.context.build(use)
        lonely = [name for name, metric in metrics.items() if metric.needs.baseline and not self.config.against]
        if lonely:
            raise DataError(f"the metric '{lonely[0]}' compares with another model", hint="name one under `against`")
        needs = [metric.needs for metric in metrics.values()]
        artifacts = [self.context.artifact(self.config.model), *self.context.artifacts(self.config.against)]
        rows = self._usable(
            self._rows(), artifacts, scored=any(need.token_logps or need.distributions for need in needs)
        )
        roles = ["model", *(f"against-{place}" for place in range(1, len(artifacts)))]
        models = [self._measured(role, item, rows, metrics) for role, item in zip(roles, artifacts, strict=True)]
        baseline = models[1] if len(models) > 1 else None
        clusters = [str(row[self.config.clusters]) for row in rows] if self.config.clusters is not None else None
        better = {name: metric.higher_is_better for name, metric in metrics.items()}
        scores = [
            {name: self._score(name, metric, model, baseline, rows) for name, metric in metrics.items()}
            for model in models
        ]
        found = [
            {**self._facts(role, model, baseline, rows, metrics, some), "intervals": intervals(some, clusters)}
            for role, model, some in zip(roles, models, scores, strict=True)
        ]
        for other, some in zip(found[1:], scores[1:], strict=True):
            other["difference"] = differences(scores[0], some, better, clusters)
        facts: Facts = {**found[0], "against": found[1:], "higher_is_better": better}
        facts["table"] = _table(facts)
        (self.context.out / "report.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
        return facts

    def _rows(self) -> list[Row]:
        rows = require_split(self.context.artifact(self.config.data), "test")
        for column in (self.config.by, self.config.clusters):
            if column is not None and column not in rows[0]:
                raise DataError(f"the data has no column '{column}'", hint="keep it with `keep` in the data stage")
        alone = sum(not prompt_of(row) for row in rows)
        if alone:
            raise DataError(f"{alone} rows of the split 'test' have nothing but an answer", hint="a prompt comes first")
        return rows

    def _measured(
        self, role: str, artifact: Artifact, rows: Sequence[Row], metrics: Mapping[str, Metric[Any]]
    ) -> _Measured:
        """Ask one model everything that any metric needs, each once."""
        self.context.log(f"measuring {artifact.manifest['stage']} on {len(rows)} rows")
        needs = {name: metric.needs for name, metric in metrics.items()}
        scoring = [name for name, need in needs.items() if need.token_logps or need.distributions]
        if artifact.kind == "export" and scoring:
            raise DataError(
                f"an export answers, but gives no probabilities, which {', '.join(scoring)} needs",
                hint="measure that on the model it was made from",
            )
        variant = self.config.variant if artifact.kind == "export" else None
        with self.context.generator(artifact, variant) as generator:
            ask = Asker(generator, self.context, self._who(artifact, variant)).ask
            answers = asked(ask, rows, needs.values(), self.config.max_new_tokens, self.context.seed)
            logps, readers = [], []
            if isinstance(generator, TransformersGenerator):
                folder = self.context.scratch / "distributions" / role
                logps, readers = measured(generator.model, generator.encoder, rows, list(needs.values()), folder)
        thinking = self._thinking(artifact)
        self._warn_of_cut(artifact, answers)
        texts = [answer.text for kind in answers.values() for row in kind for answer in row]
        unended = sum(thinking is not None and thinking.unended(text, opened=thinking.opened) for text in texts)
        if unended:
            self.context.warn(
                f"{unended} answers of {artifact.manifest['stage']} end before their thinking does and count as empty: "
                "raise `max_new_tokens`"
            )
        samples = {name: samples_of(rows, need, answers, logps, readers, thinking) for name, need in needs.items()}
        return _Measured(artifact, samples, _counts(answers, thinking))

    def _who(self, artifact: Artifact, variant: str | None) -> str:
        """Who answers: the same artifact, told the same day, in the same programs."""
        programs = [version(name) for name in ("torch", "transformers", "xllamacpp")]
        return json.dumps(["evaluate", artifact.key, variant, str(self.context.date), self.context.device, *programs])

    def _warn_of_cut(self, artifact: Artifact, answers: Asked) -> None:
        """Say how many answers ended where the model's context does."""
        cut = sum(
            answer.finish_reason == "length"
            and answer.tokens is not None
            and answer.tokens < (kind.max_new_tokens or self.config.max_new_tokens)
            for kind, found in answers.items()
            for row in found
            for answer in row
        )
        if cut:
            self.context.warn(f"{cut} answers of {artifact.manifest['stage']} are cut off: its context is full")

    def _thinking(self, artifact: Artifact) -> Thinking | None:
        """The marks at which a model's thinking is split off."""
        chosen = self.config.thinking
        if chosen == "keep":
            return None
        encoder = self._encoder(artifact)
        found = encoder.thinking if encoder is not None else USUAL
        return replace(found, opens=chosen.opens, closes=chosen.closes) if isinstance(chosen, Marks) else found

    def _encoder(self, artifact: Artifact) -> ChatEncoder | None:
        """What makes tokens for a model, or for the one that an export was made from; None where that is gone."""
        while artifact.kind == "export":
            try:
                artifact = artifact.sibling(artifact.manifest["inputs"]["model"][0])
            except (StoreError, LookupError):
                return None
        return ChatEncoder(load_tokenizer(artifact), artifact.facts["stop_token_ids"], self.context.date)

    def _usable(self, rows: list[Row], artifacts: Sequence[Artifact], *, scored: bool) -> list[Row]:
        """The rows that every model can be asked.

        Raises:
            DataError: more than `bad_rows` allows cannot.
        """
        bad: dict[int, str] = {}
        for artifact in artifacts:
            encoder = self._encoder(artifact)
            if encoder is None:
                continue
            served = artifact.kind == "export"
            room = None if served else positions_of(model_folder(artifact))
            for place, row in enumerate(rows):
                problem = None if place in bad else problem_of(encoder, row, room, scored=scored and not served)
                name = encoder.holds_control(prompt_of(row)) if served else None
                if served and (prompt_of(row).tools or any("tool_calls" in item for item in prompt_of(row))):
                    problem = "it has tools, which are not told to programs that serve"
                if name is not None:
                    problem = f"it holds {name}, which the program would obey"
                if problem is not None:
                    bad[place] = f"{artifact.manifest['stage']}: {problem}"
        if not bad:
            return rows
        place, problem = min(bad.items())
        text = f"{len(bad)} of {len(rows)} rows of the split 'test' cannot be asked: row {place + 1}, {problem}"
        if len(bad) > self.config.bad_rows.drop_up_to * len(rows) or len(bad) == len(rows):
            raise DataError(text, hint="shorten or remove them, or allow for it: `bad_rows: {drop_up_to: ...}`")
        self.context.warn(f"{text}; they were left out, for all models")
        return [row for place, row in enumerate(rows) if place not in bad]

    def _facts(
        self,
        role: str,
        model: _Measured,
        baseline: _Measured | None,
        rows: Sequence[Row],
        metrics: Mapping[str, Metric[Any]],
        scores: Mapping[str, Score],
    ) -> Facts:
        """The scores of one model, and a file with what it answered and what each row contributed."""
        values = {name: score.value for name, score in scores.items()}
        label = "" if role == "model" else f"{model.artifact.manifest['stage']}/"
        self.context.metrics({f"{label}{name}": value for name, value in values.items()}, 0)
        self._write_rows(role, model, scores, rows)
        artifact = model.artifact
        facts: Facts = {"stage": artifact.manifest["stage"], "key": artifact.key, "rows": len(rows), "scores": values}
        facts["answers"] = {name: count for name, count in model.answers.items() if count}
        facts["unread"] = {name: score.unread for name, score in scores.items() if score.unread}
        if artifact.kind == "export" and self.config.variant is not None:
            facts["variant"] = self.config.variant
        if self.config.by is not None:
            column = str(self.config.by)
            facts["slices"] = {
                value: {
                    name: self._score(name, metric, model, baseline, rows, value).value
                    for name, metric in metrics.items()
                }
                for value in sorted({str(row[column]) for row in rows})
            }
        return facts

    def _score(
        self,
        name: str,
        metric: Metric[Any],
        model: _Measured,
        baseline: _Measured | None,
        rows: Sequence[Row],
        value: str | None = None,
    ) -> Score:
        """A metric over all rows, or over those of a slice."""
        places = [place for place, row in enumerate(rows) if value is None or str(row[str(self.config.by)]) == value]
        compared = baseline.samples[name] if baseline is not None and metric.needs.baseline else None
        return metric.score(
            [model.samples[name][place] for place in places],
            None if compared is None else [compared[place] for place in places],
        )

    def _write_rows(self, role: str, model: _Measured, scores: Mapping[str, Score], rows: Sequence[Row]) -> None:
        for name, score in scores.items():
            if len(score.by_row) != len(rows):
                raise DataError(
                    f"the metric '{name}' gave {len(score.by_row)} values for {len(rows)} rows",
                    hint="report this to its author",
                )
        lines: list[str] = []
        for place in range(len(rows)):
            samples = {name: found[place] for name, found in model.samples.items()}
            first = next(iter(samples.values()))
            about = {
                "prompt": first.prompt,
                "reference": first.reference,
                "answers": {
                    name: [item.text for item in sample.answers] for name, sample in samples.items() if sample.answers
                },
                "scores": {name: score.by_row[place] for name, score in scores.items()},
            }
            lines.append(json.dumps(about, ensure_ascii=False))
        (self.context.out / f"{role}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _counts(asked: Asked, thinking: Thinking | None) -> dict[str, int]:
    """How many answers were given, and what corrupts a table: those that were cut off, and those that are empty."""
    found = [answer for kind in asked.values() for row in kind for answer in row]
    texts = [item.text if thinking is None else thinking.split(item.text, opened=thinking.opened)[1] for item in found]
    return {
        "given": len(found),
        "cut off": sum(answer.finish_reason == "length" for answer in found),
        "empty": sum(not text.strip() for text in texts),
    }


def _table(facts: Facts) -> Facts:
    """What a run's summary shows of a report: a row for each model, a column for each metric and slice."""
    names: list[str] = list(facts["scores"])
    slices: list[str] = list(facts.get("slices", {}))
    columns = [*names, *(f"{value} {name}" for value in slices for name in names)]
    rows = [
        [
            _label(found),
            *(found["scores"][name] for name in names),
            *(found["slices"][value][name] for value in slices for name in names),
        ]
        for found in [facts, *facts["against"]]
    ]
    return {"columns": columns, "rows": rows}


def _label(found: Facts) -> str:
    return f"{found['stage']} {found['variant']}" if found.get("variant") else str(found["stage"])
