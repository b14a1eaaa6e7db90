"""The report on a run as one HTML page, which needs nothing from elsewhere and no scripts."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, cast

from luthier.reporting.data_page import whole_page
from luthier.reporting.examples import Example, most_unlike
from luthier.reporting.pictures import SIGNS, curve, duration, forest, pipeline, short, told
from luthier.reporting.pictures import STYLE as PICTURES
from luthier.reporting.runs import RunRecord, StageRecord
from luthier.reporting.tables import certainty, describe, ledger, receipt

STYLE = """
:root { --bad: #cf222e; } @media (prefers-color-scheme: dark) { :root { --bad: #ff7b72; } }
nav a { margin-right: 1rem; } a { color: var(--strong); } h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.bad { color: var(--bad); font-weight: 600; } pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; }
.grid th { text-align: left; font-weight: 600; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); }
.grid td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); } .grid .number { width: auto; }
.grid th.number { text-align: right; } .wide { grid-column: 1 / -1; width: auto; } details { margin: .5rem 0; }
.trained { color: var(--strong); font-weight: 600; } .texts td { white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; } code { font-size: 12px; }
@media print { details > :not(summary) { display: block; } figure { break-inside: avoid; } }
"""
CURVES = {
    "loss": "Loss",
    "eval_loss": "Loss on held-out rows",
    "token_accuracy": "Share of trained tokens that are the likeliest",
    "learning_rate": "Learning rate",
    "grad_norm": "Norm of the gradient",
    "tokens_per_second": "Tokens per second",
}
"""What is drawn of a training stage first; what else it logs follows."""
TOTALS = ("epoch", "total_flos", "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second")
"""What a trainer logs that is no curve."""
MOST_CURVES = 12
"""Curves of one stage."""


def page(run: RunRecord) -> str:
    """The whole page."""
    title = f"Run of {run.recipe}"
    made = [(name, "".join(write(run))) for name, write in SECTIONS.items()]
    shown = [(name, text) for name, text in made if text]
    links = "".join(f'<a href="#{_anchor(name)}">{html.escape(name)}</a>' for name, _ in shown)
    body = "".join(f'<h2 id="{_anchor(name)}">{html.escape(name)}</h2>{text}' for name, text in shown)
    top = f"<h1>{html.escape(title)}</h1>{''.join(_head(run))}<nav aria-label=Sections>{links}</nav>"
    return whole_page(title, top + body, PICTURES, STYLE)


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _head(run: RunRecord) -> Iterator[str]:
    when = datetime.fromtimestamp(run.began).astimezone().strftime("%Y-%m-%d %H:%M %Z") if run.began else "unknown"
    took = duration(run.ended - run.began)
    ends = {
        "done": "done",
        "failed": "failed",
        "gate": "a gate did not hold",
        "interrupted": "interrupted",
        "running": "still running",
        "broken off": "broken off: it says nothing of its end",
    }
    bad = "" if run.state in ("done", "running") else " class=bad"
    yield f"<p class=summary>{html.escape(run.id)}, begun {when}, {took}: <span{bad}>{ends[run.state]}</span></p>"
    for stage in run.stages.values():
        if stage.message:
            yield f"<p class=bad>{html.escape(stage.id)} {html.escape(stage.outcome)}: {html.escape(stage.message)}</p>"
        for gate in stage.gates:
            if not gate.get("ok"):
                yield f"<p class=bad>{html.escape(stage.id)}: {_gate(gate)}</p>"
    if run.unread:
        yield f"<p class=bad>{run.unread} lines of its events cannot be read: it was ended while it wrote them.</p>"


def _gate(gate: Mapping[str, Any]) -> str:
    value = gate.get("value")
    measured = short(value) if isinstance(value, int | float) else "not measured"
    holds = "holds" if gate.get("ok") else "does not hold"
    return (
        f"the gate {html.escape(str(gate.get('metric')))} {html.escape(str(gate.get('required')))} {holds}: {measured}"
    )


def _stages(run: RunRecord) -> Iterator[str]:
    path = run.critical_path
    if run.stages:
        yield pipeline(run)
    if path:
        total = sum(run.stages[name].seconds or 0.0 for name in path)
        yield (
            f"<p>Thick is the critical path, {html.escape(' → '.join(path))}: {duration(total)}, below which no number "
            "of slots gets this run.</p>"
        )
    rows: list[list[str]] = []
    for stage in run.stages.values():
        cached = stage.outcome == "cached"
        time = "" if stage.seconds is None else f"({duration(stage.seconds)})" if cached else duration(stage.seconds)
        what = html.escape(describe(stage.artifact)) if stage.artifact is not None else ""
        sign = SIGNS.get(stage.outcome, "?")
        rows.append(
            [html.escape(stage.id), html.escape(stage.uses), f"{sign} {html.escape(stage.outcome)}", time, what]
        )
    if rows:
        yield grid(["stage", "uses", "outcome", "time", "what came out"], rows, numbers=(3,))
    told = [
        f"<li>{html.escape(stage.id)}: {html.escape(text)}</li>"
        for stage in run.stages.values()
        for text in stage.warnings
    ]
    if told:
        yield f"<h3>Warnings</h3><ul>{''.join(dict.fromkeys(told))}</ul>"


def _evaluation(run: RunRecord) -> Iterator[str]:
    for stage in run.stages.values():
        facts: dict[str, Any] = {} if stage.artifact is None else dict(stage.artifact.facts)
        if not models_of(facts):
            continue
        labels = labels_of(stage, facts)
        yield f"<h3>{html.escape(stage.id)}</h3>"
        table: dict[str, Any] = facts.get("table") or {"columns": [], "rows": []}
        yield grid(
            ["model", *map(str, table["columns"])],
            [
                [html.escape(labels[place] if place < len(labels) else str(row[0])), *map(_number, row[1:])]
                for place, row in enumerate(table["rows"])
            ],
            numbers=range(1, 1 + len(table["columns"])),
        )
        for gate in stage.gates:
            yield f"<p{'' if gate.get('ok') else ' class=bad'}>{_gate(gate)}.</p>"
        yield "<div class=charts>"
        models = models_of(facts)
        for metric in facts["scores"]:
            found = [
                (labels[place], float(model["scores"][metric]), *map(float, model["intervals"][metric]))
                for place, model in enumerate(models)
                if metric in model["scores"] and metric in (model.get("intervals") or {})
            ]
            if found:
                better = "higher" if (facts.get("higher_is_better") or {}).get(metric, True) else "lower"
                yield forest([row for row in found if len(row) == 4], f"{metric}, {better} is better")
        yield "</div>"
        lines = certainty(facts, labels)
        if lines:
            yield f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"
        if facts.get("prompt"):
            yield (
                "<details><summary>The first row's prompt, as the model is given it</summary>"
                f"<pre>{html.escape(str(facts['prompt']))}</pre></details>"
            )
        yield from _examples(stage, facts, labels)


def models_of(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The facts of each model of a report; none where it is of another kind."""
    found: list[Any] = [facts, *(facts.get("against") or [])] if "scores" in facts else []
    return [item for item in found if isinstance(item, dict) and isinstance(cast("Any", item).get("scores"), dict)]


def labels_of(stage: StageRecord, facts: Mapping[str, Any]) -> list[str]:
    """What the recipe calls the models that a report compares; two of one name are told apart by their places."""
    models = models_of(facts)
    against: Any = stage.config.get("against") or []
    named = [str(stage.config.get("model") or ""), *([against] if isinstance(against, str) else against)]
    if len(named) != len(models) or not named[0]:
        named = [str(item.get("stage", "")) for item in models]
    labels: list[str] = []
    for name, model in zip(named, models, strict=True):
        label = " ".join(part for part in (name, model.get("variant") or "") if part)
        labels.append(label if label not in labels else f"{label} ({len(labels) + 1})")
    return labels


def _examples(stage: StageRecord, facts: Mapping[str, Any], labels: Sequence[str]) -> Iterator[str]:
    if stage.artifact is None or len(labels) < 2:
        return
    metric = next(iter(facts["scores"]))
    higher, lower = most_unlike(stage.artifact.path, metric)
    better = (facts.get("higher_is_better") or {}).get(metric, True)
    for title, examples in (
        (f"Where {labels[0]} is better than {labels[1]} by most", higher if better else lower),
        ("Where it is worse by most", lower if better else higher),
    ):
        if examples:
            yield f"<details><summary>{html.escape(title)} ({html.escape(metric)})</summary>"
            yield from (_example(item, labels) for item in examples)
            yield "</details>"


def _example(item: Example, labels: Sequence[str]) -> str:
    parts = [("prompt", item.prompt), ("reference", item.reference), (labels[0], item.ours), (labels[1], item.theirs)]
    rows = "".join(
        f"<tr><td class=place>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>" for name, text in parts if text
    )
    return f"<table class=texts><caption>Row {item.row} ({item.gain:+.3g})</caption>{rows}</table>"


def _training(run: RunRecord) -> Iterator[str]:
    for stage in run.stages.values():
        training: dict[str, Any] = {} if stage.artifact is None else dict(stage.artifact.facts.get("training") or {})
        # What is measured once is no curve.
        drawn = [name for name, points in _series(stage).items() if len(points) > 1]
        if not training and not drawn:
            continue
        yield f"<h3>{html.escape(stage.id)}</h3><div class=charts>"
        series = _series(stage)
        names = [name for name in CURVES if name in drawn] + [name for name in drawn if name not in CURVES]
        for name in names[:MOST_CURVES]:
            yield curve(series[name], CURVES.get(name, name))
        yield "</div>"
        for line in receipt(training):
            spans = line.spans
            text = line.plain
            made: list[str] = []
            at = 0
            for span in spans:
                made.append(html.escape(text[at : span.start]))
                kind = ' class="trained"' if span.style == "green" else ""
                made.append(f"<span{kind}>{html.escape(text[span.start : span.end])}</span>")
                at = span.end
            yield f"<p>{''.join(made)}{html.escape(text[at:])}</p>"


def _series(stage: StageRecord) -> dict[str, list[tuple[float, float]]]:
    """What a stage logged, by name."""
    found: dict[str, list[tuple[float, float]]] = {}
    for step, values in stage.curve:
        for name, value in values.items():
            if name not in TOTALS:
                found.setdefault(name, []).append((float(step), value))
    return found


def _data(run: RunRecord) -> Iterator[str]:
    for stage in run.stages.values():
        if stage.artifact is None or stage.artifact.kind != "dataset":
            continue
        lines = ledger(dict(stage.artifact.facts))
        if lines:
            text = "\n".join(lines)
            yield f"<h3>{html.escape(stage.id)}</h3><pre>{html.escape(text)}</pre>"


def _others(run: RunRecord) -> Iterator[str]:
    """Exports with their agreement, and the tables that other stages make."""
    for stage in run.stages.values():
        facts: dict[str, Any] = {} if stage.artifact is None else dict(stage.artifact.facts)
        if stage.artifact is not None and stage.artifact.kind == "export":
            rows = [
                [
                    html.escape(str(about.get("file", name))),
                    f"{about['bytes'] / 1e6:,.2f} MB" if "bytes" in about else "",
                    f"{about['kl']:.2g} nats" if "kl" in about else "",
                ]
                for name, about in facts["files"].items()
            ]
            yield f"<h3>{html.escape(stage.id)}</h3>"
            yield grid(["file", "size", "KL to the model"], rows, numbers=(1, 2))
        elif isinstance(facts.get("table"), dict) and not models_of(facts):
            table: dict[str, Any] = facts["table"]
            yield f"<h3>{html.escape(stage.id)}</h3>"
            rows = [[html.escape(str(row[0])), *map(_number, row[1:])] for row in table["rows"]]
            yield grid(["", *map(str, table["columns"])], rows, numbers=range(1, 1 + len(table["columns"])))


def _again(run: RunRecord) -> Iterator[str]:
    """Every setting and version that it takes to do this again."""
    known = [stage for stage in run.stages.values() if stage.artifact is not None]
    environments: dict[str, list[str]] = {}
    for stage in known:
        assert stage.artifact is not None, "only those were taken"
        about: dict[str, Any] = dict(stage.artifact.manifest.get("environment") or {})
        about.pop("argv", None)
        environments.setdefault(json.dumps(about, indent=2, sort_keys=True), []).append(stage.id)
    for text, names in environments.items():
        who = "all stages" if len(environments) == 1 else ", ".join(names)
        yield f"<details><summary>Programs of {html.escape(who)}</summary><pre>{html.escape(text)}</pre></details>"
    for stage in run.stages.values():
        about = {"uses": stage.uses, "key": stage.key, "config": stage.config}
        if stage.artifact is not None:
            about["config"] = stage.config or stage.artifact.manifest.get("config") or {}
            about["inputs"] = stage.artifact.manifest.get("inputs") or {}
        text = json.dumps(about, indent=2, ensure_ascii=False)
        yield f"<details><summary>{html.escape(stage.id)}: every setting</summary>"
        yield f"<pre>{html.escape(text)}</pre></details>"


SECTIONS: dict[str, Callable[[RunRecord], Iterator[str]]] = {
    "Stages": _stages,
    "Evaluation": _evaluation,
    "Training": _training,
    "Data": _data,
    "Exports and tables": _others,
    "To do it again": _again,
}


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table; its cells are HTML already."""

    def kind(place: int) -> str:
        return " class=number" if place in numbers else ""

    head = "".join(f"<th scope=col{kind(place)}>{html.escape(name)}</th>" for place, name in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(f"<td{kind(place)}>{cell}</td>" for place, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f"<div class=scroll><table class=grid><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _number(value: Any) -> str:
    return html.escape(told(value))
