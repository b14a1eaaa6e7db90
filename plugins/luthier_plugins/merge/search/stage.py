"""The stage ``search``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import cmaes
import numpy as np
from luthier.api import Artifact, Facts, Metric, Row, StageContext
from luthier.artifacts.datasets import require_split
from luthier.train.loading import fold, load_model, load_tokenizer
from luthier.train.measure import items_of
from luthier_plugins.merge.check import check
from luthier_plugins.merge.engine import Engine, Settings, extras_of
from luthier_plugins.merge.layout import Inputs, lay_out
from luthier_plugins.merge.merging import merge_into, open_inputs, prepared_by
from luthier_plugins.merge.search.config import SearchConfig
from luthier_plugins.merge.search.memory import IntoModel, held_where_they_fit
from luthier_plugins.merge.verify import Verifier

NOISE = 2.0
"""How many standard errors a difference has to be to count."""
Trial = dict[str, Any]


class Search:
    """CMA-ES (Hansen and Ostermeier 2001) on the metric; every trial is kept, so that a stopped search goes on."""

    def __init__(self, config: SearchConfig) -> None:
        self.config = config

    def run(self, context: StageContext) -> Facts:
        with Verifier(context.out) as verifier:
            with ExitStack() as stack:
                judge = _Judge(self.config, context)
                alone = [judge.of_model(artifact) for artifact in context.inputs("models")]
                trials = self._trials(judge, context, stack)
                best = max(trials, key=lambda trial: trial["merit"])
                judge.merge(best["values"])
                final = judge.rows()
            facts = merge_into(self.config.merge(best["values"]), context, verifier)
        report = self._report(trials, best, alone, final, judge, context)
        (context.out / "search.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
        return {**facts, "search": report}

    def _trials(self, judge: _Judge, context: StageContext, stack: ExitStack) -> list[Trial]:
        judge.hold(context, stack)
        path = context.work / "trials.jsonl"
        known = _known(path)
        if known:
            context.log(f"going on after {len(known)} trials")
        trials: list[Trial] = []
        with path.open("a", encoding="utf-8") as file:
            for point in self._points(trials, context.seed):
                context.progress(len(trials), self.config.trials, "trials")
                values = self.config.values_at(point)
                trial: Trial | None = known[len(trials)] if len(trials) < len(known) else None
                if trial is None or trial["values"] != values:
                    judge.merge(values)
                    score = judge.score()
                    trial = {"values": values, "score": score, "merit": score if judge.highest else -score}
                    file.write(json.dumps(trial) + "\n")
                    file.flush()
                trials.append(trial)
                context.metrics({"score": trial["score"]}, len(trials))
        return trials

    def _points(self, trials: list[Trial], seed: int) -> Any:
        """The points to try; what was tried is read from `trials` between them."""
        bounds = np.array(self.config.bounds)
        width = bounds[:, 1] - bounds[:, 0]
        # CMA-ES wants two dimensions at least: a single parameter gets one beside it that nothing depends on.
        extra = max(0, 2 - len(bounds))
        size = len(bounds) + extra
        optimizer = cmaes.CMA(
            mean=np.full(size, 0.5), sigma=0.3, bounds=np.array([[0.0, 1.0]] * size), seed=seed or 1,
            population_size=self.config.population,
        )  # fmt: skip
        yield [float(value) for value in bounds.mean(axis=1)]
        while True:
            asked: list[Any] = []
            for _ in range(optimizer.population_size):
                if len(trials) >= self.config.trials:
                    return
                asked.append(optimizer.ask())
                yield [float(value) for value in bounds[:, 0] + asked[-1][: len(bounds)] * width]
            optimizer.tell(
                [(point, -trial["merit"]) for point, trial in zip(asked, trials[-len(asked) :], strict=True)]
            )

    def _report(
        self, trials: list[Trial], best: Trial, alone: list[Trial], final: list[float], judge: _Judge,
        context: StageContext,
    ) -> Facts:  # fmt: skip
        labels = [str(artifact.manifest.get("stage")) for artifact in context.inputs("models")]
        against = [{"model": label, "score": found["score"], **_compared(final, found["rows"])}
                   for label, found in zip(labels, alone, strict=True)]  # fmt: skip
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


def _compared(best: Sequence[float], other: Sequence[float]) -> Facts:
    """The mean difference row by row, larger is better, and whether it is more than noise."""
    differences = np.array(best) - np.array(other)
    error = float(differences.std(ddof=1) / math.sqrt(len(differences))) if len(differences) > 1 else math.inf
    mean = float(differences.mean())
    told = None if math.isinf(error) else error
    return {"difference": mean, "standard_error": told, "beyond_noise": mean > NOISE * error}


class _Judge:
    """Measures merges on the validation rows, with one loaded model whose parameters are replaced."""

    def __init__(self, config: SearchConfig, context: StageContext) -> None:
        self.config = config
        self.metric: Metric = context.component(config.metric)
        self.highest = self.metric.needs == "predictions"
        self._data: list[Row] = require_split(context.input("data"), "validation")
        self._context = context
        self._lead = context.input("base") if config.base else context.inputs("models")[0]
        self._tokenizer = load_tokenizer(self._lead)
        self._model: Any = fold(load_model(self._lead))

    def hold(self, context: StageContext, stack: ExitStack) -> None:
        """Open the inputs, in memory where they fit."""
        base = context.input("base") if self.config.base else None
        opened = open_inputs(context.inputs("models"), base, context, stack)
        check(self.config.merge(self.config.values_at([bound[1] for bound in self.config.bounds])), opened)
        held = held_where_they_fit([*opened.models, *([opened.base] if opened.base else [])])
        count = len(opened.models)
        self._inputs = Inputs(held[:count], held[count] if opened.base else None)
        method = context.component(self.config.method)
        self._extras = extras_of(prepared_by(method, context, context.inputs("models")))

    def merge(self, values: dict[str, float]) -> None:
        """Put the merge with these values into the model."""
        config = self.config.merge(values)
        layout = lay_out(config, self._inputs, self._context.seed, config.dtype)
        tasks = [replace(task, extras=self._extras(task.place.name)) for task in layout.tasks]
        target: Any = IntoModel(self._model, layout.tensors)
        workers = Settings(len(os.sched_getaffinity(0)))
        Engine(self._context.component(config.method), target, workers, lambda done, total: None).run(tasks)

    def score(self) -> float:
        """The metric of the model as it is."""
        return self.metric.score(self._items(self._model))

    def rows(self) -> list[float]:
        """How good each row is: its loss per token with the sign turned, or its own score."""
        return self._by_row(self._items(self._model))

    def of_model(self, artifact: Artifact) -> Trial:
        """The score of one of the inputs, and its rows."""
        items = self._items(fold(load_model(artifact)))
        return {"score": self.metric.score(items), "rows": self._by_row(items)}

    def _items(self, model: Any) -> Sequence[Any]:
        stops = self._lead.facts["stop_token_ids"]
        found = items_of(
            model, self._tokenizer, self._data, {self.metric.needs}, stops, self.config.max_new_tokens
        )  # fmt: skip
        return found[self.metric.needs]

    def _by_row(self, items: Sequence[Any]) -> list[float]:
        if self.highest:
            return [self.metric.score([item]) for item in items]
        return [-item.nll / max(1, item.tokens) for item in items]
