"""Tables and lines about artifacts: what a run's summary, and ``luthier show``, are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from luthier.api.artifact import Artifact

SMALL = 0.01
"""Numbers below this are shown by their digits."""


def describe(artifact: Artifact) -> str:
    """One line about what an artifact is."""
    facts = artifact.facts
    head = f"{artifact.kind} {artifact.key[:12]}"
    match artifact.kind:
        case "dataset":
            rows = ", ".join(f"{number(count, ',')} {split}" for split, count in facts.get("rows", {}).items())
            return f"{head}  {facts.get('schema', '?')}: {rows}"
        case "model":
            size = f"{facts.get('parameters', 0) / 1e6:.1f} M {facts.get('dtype', '?')}"
            quantized = f", {facts['quantization']['method']}" if "quantization" in facts else ""
            return f"{head}  {facts.get('architecture', '?')}, {size}{quantized}{_loss(facts)}"
        case "adapter":
            return f"{head}  {facts.get('adapter', '?')}, r={facts.get('r', '?')}{_loss(facts)}"
        case "export":
            return f"{head}  {facts.get('format', '?')}: {', '.join(facts.get('files', {}))}"
        case "report":
            scores = facts.get("scores", {})
            shown = ", ".join(f"{name} {number(value, '.3f')}" for name, value in scores.items())
            return f"{head}  {shown}"


def number(value: Any, form: str) -> str:
    """A number in a format; what a plugin gives instead of one, as it is."""
    if value is None:
        return "-"
    return format(value, form) if isinstance(value, (int, float)) else str(value)


def _loss(facts: dict[str, Any]) -> str:
    training: dict[str, Any] = facts.get("training") or {}
    if "loss_first" not in training:
        return ""
    return f", loss {number(training['loss_first'], '.3g')} -> {number(training['loss_last'], '.3g')}"


def receipt(training: dict[str, Any]) -> list[Text]:
    """What a stage trained, as lines: its facts in words, and the first rows with what is trained of them marked."""
    found: list[Text] = []
    trained: dict[str, Any] = training.get("trained") or {}
    if "parameters" in trained:
        line = f"{trained['parameters'] / 1e6:.3g} M weights, {trained['share']:.2%} of the model"
        idle: list[str] = trained.get("without_gradient") or []
        line += f"; no gradient came to {len(idle)} tensors" if idle else "; a gradient came to each"
        norms: dict[str, float] = (training.get("stored") or {}).get("norms") or {}
        if norms:
            line += f"; the norm of their change is {norms['change']:.3g}, theirs was {norms['before']:.3g}"
        found.append(Text(line))
        rate = trained.get("tokens_per_second")
        speed = f"{rate:.0f} tokens per second, " if rate else ""
        share = f" ({trained['mfu']:.0%} of what the GPU can do)" if "mfu" in trained else ""
        found.append(Text(f"{speed}{trained['peak_memory'] / 1e9:.3g} GB at most{share}"))
    if "router_load" in training:
        before, after = (training["router_load"][when] for when in ("before", "after"))
        moved = max((abs(x - y) for name in before for x, y in zip(before[name], after[name], strict=True)), default=0)
        unused = [sum(share == 0 for shares in some.values() for share in shares) for some in (before, after)]
        most = [max(share for shares in some.values() for share in shares) for some in (before, after)]
        found.append(
            Text(
                f"router: the busiest expert takes {most[0]:.0%} of a layer's tokens before and {most[1]:.0%} after, "
                f"{unused[0]} and {unused[1]} experts take none; shares moved by up to {moved:.1%}"
            )
        )
    if "reload_difference" in training:
        found.append(Text(f"loaded again, logits differ by {training['reload_difference']:.1g} of the largest"))
    for number_, parts in enumerate(training.get("first_rows") or [], 1):
        line = Text(f"row {number_}: ", style="bold")
        for part in parts:
            # Also where there are no colours it has to be seen.
            shown = part["text"].replace("\n", "\\n")
            line.append(f"\u27e6{shown}\u27e7" if part["trained"] else shown, "green" if part["trained"] else "dim")
        found.append(line)
    return found


def ledger(facts: dict[str, Any]) -> list[str]:
    """What became of a dataset's rows, as lines: those that came, those that did not stay and why, those that are."""
    lines = [f"{count:+,}".rjust(12) + f"  {what}" for what, count in facts.get("ledger") or []]
    rows: dict[str, int] = facts["rows"]
    return [*lines, *(f"{count:,}".rjust(12) + f"  {split}" for split, count in rows.items())] if lines else []


def report_table(name: str, content: dict[str, Any], labels: list[str]) -> Table:
    """A report as a table: a row for each model.

    Args:
        name: The stage.
        content: The fact ``table``: columns, and rows that begin with a label.
        labels: What to call the rows instead, where there are as many.
    """
    table = Table(title=escape(name), title_justify="left", box=None, padding=(0, 2), title_style="bold")
    table.add_column("model")
    for column in content["columns"]:
        table.add_column(escape(column), justify="right")
    rows: list[list[Any]] = content["rows"]
    for place, (known, *values) in enumerate(rows):
        label = str(known)
        if len(labels) == len(rows):
            # A report may say more than the name, such as the file of an export.
            label = f"{labels[place]} {label.partition(' ')[2]}".rstrip()
        table.add_row(escape(label), *(number(value, _form(value)) for value in values))
    return table


def certainty(facts: dict[str, Any], labels: Sequence[str]) -> list[str]:
    """What a report's numbers are worth, as lines: intervals, differences that are told and those that are not, and
    answers that are no whole ones.

    Args:
        facts: The report's.
        labels: What to call the models, the measured one first, where there are as many.
    """
    models: list[dict[str, Any]] = [facts, *facts.get("against", [])]
    names = list(labels) if len(labels) == len(models) else [str(model.get("stage", "")) for model in models]
    lines: list[str] = []
    counts: dict[str, int] = facts.get("rows_by_metric") or {}
    for metric, (low, high) in (facts.get("intervals") or {}).items():
        lines.append(
            f"{metric} of {names[0]}: {_near(low)} to {_near(high)} (95 %, {counts.get(metric, facts['rows']):,} rows)"
        )
    for name, model in zip(names[1:], models[1:], strict=True):
        for metric, about in (model.get("difference") or {}).items():
            ends = f"{_signed(about['value'])} (95 %: {_signed(about['low'])} to {_signed(about['high'])})"
            if about["low"] == about["high"] == 0:
                lines.append(f"{metric}: {names[0]} and {name} are the same on every row")
            elif about["verdict"] == "not told":
                more = f"; about {about['needed']:,} rows would tell this difference" if about["needed"] else ""
                lines.append(f"{metric}: {names[0]} cannot be told from {name}, {ends}{more}")
            else:
                lines.append(
                    f"{metric}: {names[0]} is {about['verdict']} than {name}, {ends}, p {about['corrected']:.2g}"
                )
    for name, model in zip(names, models, strict=True):
        answers: dict[str, int] = model.get("answers") or {}
        bad = [f"{answers[kind]:,} {kind}" for kind in ("cut off", "empty") if answers.get(kind)]
        bad += [f"{count:,} that {metric} could not read" for metric, count in (model.get("unread") or {}).items()]
        for metric, found in (model.get("counts") or {}).items():
            lines.append(f"{metric} of {name}: " + ", ".join(f"{count:,} {what}" for what, count in found.items()))
        if bad:
            lines.append(f"{name}: of {answers.get('given', 0):,} answers {', '.join(bad)}")
    return lines


def _near(value: float) -> str:
    return number(value, _form(value))


def _signed(value: float) -> str:
    return f"{'+' if value >= 0 else '-'}{_near(abs(value))}"


def _form(value: Any) -> str:
    """Three decimals, or two digits of what would be nothing but zeros."""
    return "#.2g" if isinstance(value, float) and 0 < abs(value) < SMALL else ".3f"


def files_table(export: Artifact) -> Table:
    """The files of an export."""
    table = Table(box=None, padding=(0, 2))
    table.add_column("file")
    table.add_column("size", justify="right")
    table.add_column("KL to the model", justify="right")
    for name, about in export.facts["files"].items():
        kl = f"{about['kl']:.2g} nats" if "kl" in about else ""
        size = f"{about['bytes'] / 1e6:.2f} MB" if "bytes" in about else ""
        table.add_row(escape(str(about.get("file", name))), size, kl)
    return table
