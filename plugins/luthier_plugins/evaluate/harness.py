"""Runs tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from luthier.api import Artifact, DataError, Facts, Score, Stage
from luthier.artifacts.extras import needed
from luthier.modeling.generate import TransformersGenerator
from luthier_plugins.evaluate.certainty import differences, intervals
from luthier_plugins.evaluate.harness_config import HarnessConfig

Sampled = dict[str, list[dict[str, Any]]]


class Harness(Stage[HarnessConfig]):
    """The stage ``lm_eval``."""

    def run(self) -> Facts:
        library = needed("lm_eval", "lm_eval", "lm-eval")
        manager = self._manager()
        unknown = [name for name in self.config.tasks if not manager.match_tasks([name])]
        if unknown:
            raise DataError(
                f"lm-evaluation-harness knows no task '{unknown[0]}'",
                hint="`lm_eval ls tasks` lists them; `include` names a folder with task files of yours",
            )
        artifacts = [self.context.artifact(self.config.model), *self.context.artifacts(self.config.against)]
        roles = ["model", *(f"against-{place}" for place in range(1, len(artifacts)))]
        facts_of: list[Facts] = []
        scores_of: list[dict[str, Score]] = []
        better: dict[str, bool] = {}
        told: Facts = {}
        for role, artifact in zip(roles, artifacts, strict=True):
            found = self._measured(library, manager, artifact)
            scores, higher = _scores(found)
            better |= higher
            told = {
                "task_versions": {name: str(number) for name, number in found["versions"].items()},
                "lm_eval": str(found["lm_eval_version"]),
            }
            _write(self.context.out / f"{role}.jsonl", found["samples"], scores)
            values = {name: score.value for name, score in scores.items()}
            label = "" if role == "model" else f"{artifact.manifest['stage']}/"
            self.context.metrics({f"{label}{name}": value for name, value in values.items()}, 0)
            scores_of.append(scores)
            facts_of.append(
                {
                    "stage": artifact.manifest["stage"],
                    "key": artifact.key,
                    "rows": sum(count["effective"] for count in found["n-samples"].values()),
                    "scores": values,
                    "rows_by_metric": {name: len(score.by_row) for name, score in scores.items()},
                    "intervals": intervals(scores, {}),
                }
            )
        for other, some in zip(facts_of[1:], scores_of[1:], strict=True):
            other["difference"] = differences(scores_of[0], some, better, {})
        facts: Facts = {**facts_of[0], **told, "against": facts_of[1:], "higher_is_better": better}
        columns = list(facts["scores"])
        facts["table"] = {
            "columns": columns,
            "rows": [[item["stage"], *(item["scores"].get(name) for name in columns)] for item in facts_of],
        }
        (self.context.out / "report.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
        return facts

    def _manager(self) -> Any:
        """What knows the tasks: those of the recipe's folder alone where they are enough, for it takes seconds to read
        all that come with the harness."""
        library = needed("lm_eval.tasks", "lm_eval", "lm-eval")
        if self.config.include is None:
            return library.TaskManager()
        folder = str(self.context.path(self.config.include))
        own = library.TaskManager(include_path=folder, include_defaults=False)
        if all(own.match_tasks([name]) for name in self.config.tasks):
            return own
        return library.TaskManager(include_path=folder)

    def _measured(self, library: Any, manager: Any, artifact: Artifact) -> Mapping[str, Any]:
        """What the harness says of one model."""
        self.context.log(f"measuring {artifact.manifest['stage']} on {', '.join(self.config.tasks)}")
        wrapper = needed("lm_eval.models.huggingface", "lm_eval", "lm-eval").HFLM
        with self.context.generator(artifact) as generator:
            assert isinstance(generator, TransformersGenerator), "exports are no inputs of this stage"
            model = wrapper(
                pretrained=generator.model, tokenizer=generator.tokenizer, batch_size=self.config.batch_size
            )
            return cast(
                "Mapping[str, Any]",
                library.simple_evaluate(
                    model=model,
                    tasks=list(self.config.tasks),
                    task_manager=manager,
                    num_fewshot=self.config.few_shot,
                    limit=self.config.limit,
                    apply_chat_template=self.config.chat,
                    fewshot_as_multiturn=self.config.chat,
                    # The intervals are made of its samples, and compare models row by row.
                    bootstrap_iters=0,
                    log_samples=True,
                    confirm_run_unsafe_code=self.config.allow_code,
                    random_seed=self.context.seed,
                    numpy_random_seed=self.context.seed,
                    torch_random_seed=self.context.seed,
                    fewshot_random_seed=self.context.seed,
                ),
            )


def _scores(found: Mapping[str, Any]) -> tuple[dict[str, Score], dict[str, bool]]:
    """The metrics of all tasks as ``task/metric``, with each row's part where the harness tells it, and whether higher
    is better."""
    scores: dict[str, Score] = {}
    better: dict[str, bool] = {}
    samples: Sampled = found["samples"]
    for task, results in found["results"].items():
        for key, value in results.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            name = f"{task}/{metric}" if kind == "none" else f"{task}/{metric},{kind}"
            of_rows = [item.get(metric) for item in samples.get(task, []) if item.get("filter", "none") == kind]
            plain = bool(of_rows) and all(isinstance(item, int | float) for item in of_rows)
            rows = [float(cast("float", item)) for item in of_rows] if plain else []
            scores[name] = Score(float(value), rows, is_mean=plain)
            better[name] = bool((found["higher_is_better"].get(task) or {}).get(metric, True))
    return scores, better


def _write(path: Path, samples: Sampled, scores: Mapping[str, Score]) -> None:
    """What the model was asked, and what each row contributed."""
    lines: list[str] = []
    for task, items in samples.items():
        for item in items:
            kind = item.get("filter", "none")
            names = {
                metric: f"{task}/{metric}" if kind == "none" else f"{task}/{metric},{kind}"
                for metric in item["metrics"]
            }
            asked: Any = item.get("arguments") or [[""]]
            about = {
                "task": task,
                "prompt": str(_first(asked)),
                "reference": str(item.get("target")),
                "answers": {name: [str(_first(item.get("filtered_resps")))] for name in names.values()},
                "scores": {name: item[metric] for metric, name in names.items() if name in scores},
            }
            lines.append(json.dumps(about, ensure_ascii=False, default=str))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _first(value: Any) -> Any:
    """The first of whatever is nested."""
    while isinstance(value, Sequence) and not isinstance(value, str):
        value = cast("Sequence[Any]", value)[0] if value else ""
    return value
