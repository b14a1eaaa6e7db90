"""Asking models everything that metrics need, each once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from luthier.api import Artifact, DataError, Metric, Row, Sample, StageContext, StoreError
from luthier.artifacts.models import positions_of
from luthier.artifacts.rows import prompt_of
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.generate import TransformersGenerator
from luthier.modeling.loading import load_tokenizer, model_folder
from luthier.modeling.samples import Asked, asked, problem_of, samples_of
from luthier.modeling.scoring import Scored, scored
from luthier.modeling.thinking import USUAL, Thinking
from luthier.serving.asking import Asker
from luthier_plugins.evaluate.config import EvaluateConfig, Marks


@dataclass(frozen=True, slots=True)
class Task:
    """Rows, and what is measured on them.

    Attributes:
        title: What files about it begin with; empty for the stage's own data.
        rows: The rows.
        places: Their places in the split.
        metrics: The metrics, by what reports call them.
    """

    title: str
    rows: list[Row]
    places: list[int]
    metrics: Mapping[str, Metric[Any]]


@dataclass(frozen=True, slots=True)
class Measured:
    """One model: what metrics see of it.

    Attributes:
        artifact: The model.
        samples: For each task, the samples by metric.
        answers: How many answers there are, and how many of them are no whole ones.
        prompt: The first row's prompt, as the model is given it; None where the model is gone that would tell.
    """

    artifact: Artifact
    samples: Sequence[Mapping[str, Sequence[Sample]]]
    answers: Mapping[str, int]
    prompt: str | None


class Models:
    """What the stage `evaluate` asks models.

    Args:
        config: The stage's config.
        context: The stage's context.
    """

    def __init__(self, config: EvaluateConfig, context: StageContext) -> None:
        self.config = config
        self.context = context

    def measured(self, role: str, artifact: Artifact, tasks: Sequence[Task]) -> Measured:
        """Ask one model everything that any metric needs, each once.

        Args:
            role: What its files are called.
            artifact: The model.
            tasks: What is measured.
        """
        self.context.log(f"measuring {artifact.manifest['stage']} on {sum(len(task.rows) for task in tasks)} rows")
        thinking = self._thinking(artifact)
        variant = self.config.variant if artifact.kind == "export" else None
        samples: list[Mapping[str, Sequence[Sample]]] = []
        counts: list[dict[str, int]] = []
        with self.context.generator(artifact, variant) as generator:
            ask = Asker(generator, self.context, self._who(artifact, variant)).ask
            for number, task in enumerate(tasks):
                needs = {name: metric.needs for name, metric in task.metrics.items()}
                answers = asked(ask, task.rows, needs.values(), self.config.max_new_tokens, self.context.seed)
                found: list[Scored] = []
                if isinstance(generator, TransformersGenerator):
                    folder = self.context.scratch / "distributions" / role / str(number)
                    found = scored(
                        generator.model,
                        generator.encoder,
                        task.rows,
                        list(needs.values()),
                        folder,
                        self.context.progress,
                    )
                self._warn_of(artifact, answers, thinking)
                samples.append(
                    {name: samples_of(task.rows, need, answers, found, thinking) for name, need in needs.items()}
                )
                counts.append(_counts(answers, thinking))
        encoder = self._encoder(artifact)
        prompt = None
        if encoder is not None:
            prompt = str(encoder.tokenizer.decode(encoder.prompt(prompt_of(tasks[0].rows[0]))))
        total = {name: sum(some[name] for some in counts) for name in counts[0]}
        return Measured(artifact, samples, total, prompt)

    def _who(self, artifact: Artifact, variant: str | None) -> str:
        """Who answers: the same artifact, told the same day, in the same programs."""
        programs = [version(name) for name in ("torch", "transformers", "xllamacpp")]
        return json.dumps(["evaluate", artifact.key, variant, str(self.context.date), self.context.device, *programs])

    def _warn_of(self, artifact: Artifact, answers: Asked, thinking: Thinking | None) -> None:
        """Say how many answers ended where the model's context does, and how many before their thinking did."""
        name = artifact.manifest["stage"]
        cut = sum(
            answer.finish_reason == "length"
            and answer.tokens is not None
            and answer.tokens < (kind.max_new_tokens or self.config.max_new_tokens)
            for kind, found in answers.items()
            for row in found
            for answer in row
        )
        if cut:
            self.context.warn(f"{cut} answers of {name} are cut off: its context is full")
        texts = [answer.text for kind in answers.values() for row in kind for answer in row]
        unended = sum(thinking is not None and thinking.unended(text, opened=thinking.opened) for text in texts)
        if unended:
            self.context.warn(
                f"{unended} answers of {name} end before their thinking does and count as empty: raise `max_new_tokens`"
            )

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

    def usable(self, rows: list[Row], artifacts: Sequence[Artifact], metrics: Mapping[str, Metric[Any]]) -> list[int]:
        """The places of the rows that every model can be asked.

        Args:
            rows: The rows.
            artifacts: The models.
            metrics: What is measured.

        Raises:
            DataError: more than `bad_rows` allows cannot.
        """
        needs = [metric.needs for metric in metrics.values()]
        bad: dict[int, str] = {}
        own = any(need.token_logps or need.distributions for need in needs)
        choices = [need.choices for need in needs if need.choices is not None]
        for artifact in artifacts:
            encoder = self._encoder(artifact)
            if encoder is None:
                continue
            served = artifact.kind == "export"
            room = None if served else positions_of(model_folder(artifact))
            for place, row in enumerate(rows):
                problem = None
                if place not in bad:
                    problem = problem_of(encoder, row, room, scored=own and not served, choices=choices)
                name = encoder.holds_control(prompt_of(row)) if served else None
                if served and (prompt_of(row).tools or any("tool_calls" in item for item in prompt_of(row))):
                    problem = "it has tools, which are not told to programs that serve"
                if name is not None:
                    problem = f"it holds {name}, which the program would obey"
                if problem is not None:
                    bad[place] = f"{artifact.manifest['stage']}: {problem}"
        if not bad:
            return list(range(len(rows)))
        place, problem = min(bad.items())
        text = f"{len(bad)} of {len(rows)} rows of the split 'test' cannot be asked: row {place + 1}, {problem}"
        if len(bad) > self.config.bad_rows.drop_up_to * len(rows) or len(bad) == len(rows):
            raise DataError(text, hint="shorten or remove them, or allow for it: `bad_rows: {drop_up_to: ...}`")
        self.context.warn(f"{text}; they were left out, for all models")
        return [place for place in range(len(rows)) if place not in bad]


def _counts(asked: Asked, thinking: Thinking | None) -> dict[str, int]:
    """How many answers were given, and what corrupts a table: those that were cut off, and those that are empty."""
    found = [answer for kind in asked.values() for row in kind for answer in row]
    texts = [item.text if thinking is None else thinking.split(item.text, opened=thinking.opened)[1] for item in found]
    return {
        "given": len(found),
        "cut off": sum(answer.finish_reason == "length" for answer in found),
        "empty": sum(not text.strip() for text in texts),
    }
