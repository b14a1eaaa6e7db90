"""Measures models on held-out rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from luthier.api import Artifact, DataError, Exporter, Facts, Metric, Row, StageContext
from luthier.artifacts.datasets import require_split
from luthier.modeling.loading import load_model, load_tokenizer, to_best_device
from luthier.modeling.measure import items_of, predictions_of
from luthier_plugins.evaluate.config import EvaluateConfig


class Evaluate:
    """The stage ``evaluate``."""

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config

    def run(self, context: StageContext) -> Facts:
        rows = require_split(context.input("data"), "test")
        if self.config.by is not None and self.config.by not in rows[0]:
            raise DataError(f"the data has no column '{self.config.by}'", hint="keep it with `keep` in the data stage")
        alone = sum(len(row["messages"]) < 2 for row in rows)
        if alone:
            raise DataError(f"{alone} rows of the split 'test' have nothing but an answer", hint="a prompt comes first")
        metrics: dict[str, Metric] = {use.name: context.component(use) for use in self.config.metrics}
        facts = self._measure("model", context.input("model"), rows, metrics, context)
        facts["against"] = [
            self._measure(f"against-{place}", artifact, rows, metrics, context)
            for place, artifact in enumerate(context.inputs("against"), 1)
        ]
        facts["table"] = _table(facts)
        (context.out / "report.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
        return facts

    def _measure(
        self, role: str, artifact: Artifact, rows: list[Row], metrics: dict[str, Metric], context: StageContext
    ) -> Facts:
        context.log(f"measuring {artifact.manifest['stage']} on {len(rows)} rows")
        items = self._items(role, artifact, rows, {metric.needs for metric in metrics.values()}, context)
        scores = {name: metric.score(items[metric.needs]) for name, metric in metrics.items()}
        context.metrics(scores, 0)
        facts: Facts = {"stage": artifact.manifest["stage"], "key": artifact.key, "rows": len(rows), "scores": scores}
        if artifact.kind == "export" and self.config.variant is not None:
            facts["variant"] = self.config.variant
        if self.config.by is not None:
            facts["slices"] = {value: self._slice(value, rows, items, metrics) for value in self._values(rows)}
        return facts

    def _values(self, rows: list[Row]) -> list[str]:
        return sorted({str(row[str(self.config.by)]) for row in rows})

    def _slice(
        self, value: str, rows: list[Row], items: dict[str, Sequence[Any]], metrics: dict[str, Metric]
    ) -> dict[str, float]:
        places = [place for place, row in enumerate(rows) if str(row[str(self.config.by)]) == value]
        return {
            name: metric.score([items[metric.needs][place] for place in places]) for name, metric in metrics.items()
        }

    def _items(
        self, role: str, artifact: Artifact, rows: list[Row], needs: set[str], context: StageContext
    ) -> dict[str, Sequence[Any]]:
        ask = self._ask_export if artifact.kind == "export" else self._ask_model
        items: dict[str, Sequence[Any]] = ask(artifact, rows, needs, context)
        if "predictions" in items:
            lines = [json.dumps(asdict(item), ensure_ascii=False) for item in items["predictions"]]
            (context.out / f"{role}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return items

    def _ask_model(
        self, artifact: Artifact, rows: list[Row], needs: set[str], context: StageContext
    ) -> dict[str, Sequence[Any]]:
        return items_of(
            to_best_device(load_model(artifact)),
            load_tokenizer(artifact),
            rows,
            needs,
            artifact.facts["stop_token_ids"],
            self.config.max_new_tokens,
            progress=lambda done, total: context.progress(done, total, "answers"),
        )

    def _ask_export(
        self, artifact: Artifact, rows: list[Row], needs: set[str], context: StageContext
    ) -> dict[str, Sequence[Any]]:
        if "losses" in needs:
            names = ", ".join(use.name for use in self.config.metrics)
            raise DataError(
                f"an export answers, but tells no token losses, which one of {names} needs",
                hint="measure perplexity on the model it was made from",
            )
        exporter: Exporter = context.make("exporter", artifact.facts["format"])
        with exporter.serve(artifact, self.config.variant, self.config.max_new_tokens) as program:
            answers: list[str] = []
            for answer in program.answer([row["messages"][:-1] for row in rows]):
                context.progress(len(answers), len(rows), "answers")
                answers.append(answer)
        return {"predictions": predictions_of(rows, answers)}


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
