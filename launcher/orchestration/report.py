"""A run's account for people: Markdown, and one HTML page that needs nothing beside itself. Pure."""

import html
import time
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.orchestration.accounting import Account, Span
from launcher.orchestration.progress import readable_seconds

COLOURS = {
    "training": "#2e7d32",
    "evaluation": "#81c784",
    "checkpoint": "#fbc02d",
    "export": "#fff176",
    "compile": "#7e57c2",
    "start-up": "#1e88e5",
    "recovery": "#fb8c00",
    "lost work": "#d32f2f",
    "queue": "#b0bec5",
    "idle": "#cfd8dc",
}
"""Of each group of the account in the timeline, in the order in which they are drawn within a span."""
ORDER = (
    "queue",
    "start-up",
    "recovery",
    "compile",
    "evaluation",
    "checkpoint",
    "training",
    "lost work",
    "export",
    "idle",
)
WIDTH, ROW, LABEL = 960, 26, 110

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; margin: 1em 0 }} td, th {{ padding: .2em .8em; border-bottom: 1px solid #ddd }}
th {{ text-align: left }} td.number {{ text-align: right; font-variant-numeric: tabular-nums }}
.swatch {{ display: inline-block; width: .8em; height: .8em; margin-right: .4em }} svg text {{ font: 12px sans-serif }}
</style></head><body>
<h1>{title}</h1><p>{headline}</p>
<h2>Timeline</h2>{timeline}<p>{legend}</p>
<h2>Where the time went</h2>{parts}
<h2>Incidents</h2>{incidents}
<h2>Stragglers</h2>{stragglers}
</body></html>
"""


def headline(account: Account) -> str:
    """The account in one line."""
    goodput = account.goodput
    attempts = sum(span.name.startswith("attempt") for span in account.spans)
    share = "no time was used yet" if goodput is None else f"goodput {goodput:.1%}"
    return (
        f"{share} of {readable_seconds(account.allocated)} allocated ({readable_seconds(account.wall)} in all); "
        f"{attempts} attempt(s), {len(account.incidents)} of them failed"
    )


def part_rows(account: Account) -> list[tuple[str, str, str]]:
    """(what, seconds, share of the whole), the largest first."""
    wall = account.wall or 1.0
    return [(name, f"{seconds:,.1f} s", f"{seconds / wall:.1%}") for name, seconds in account.seconds.items()]


INCIDENT_HEADS = ("Attempt", "When", "Rank", "Node", "What", "Step", "Phase", "Cost", "Evidence")


def incident_rows(account: Account) -> list[tuple[str, ...]]:
    """A row for each failed attempt, in the columns of `INCIDENT_HEADS`."""
    rows: list[tuple[str, ...]] = []
    for span in account.incidents:
        facts: Mapping[str, Any] = span.facts
        rows.append(
            (
                span.name.removeprefix("attempt "),
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(span.end)),
                str(facts.get("rank", "-")),
                str(facts.get("node") or "-"),
                str(facts.get("category", span.outcome)),
                str(facts.get("step", "-")),
                str(facts.get("phase", "-")),
                f"{account.cost(span):,.1f} s",
                str(facts.get("evidence") or facts.get("reason", "")).splitlines()[0][:200],
            )
        )
    return rows


def as_markdown(account: Account, name: str) -> str:
    """The report as Markdown."""
    lines = [f"# Report of {name}", "", headline(account), "", "## Where the time went", ""]
    lines += _markdown_table(("What", "Time", "Share"), part_rows(account))
    lines += ["", "## Incidents", ""]
    incidents = incident_rows(account)
    lines += _markdown_table(INCIDENT_HEADS, incidents) if incidents else ["None."]
    if account.stragglers:
        lines += ["", "## Stragglers", "", *(f"- {found['message']}" for found in account.stragglers)]
    return "\n".join(lines) + "\n"


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (list(heads), ["---"] * len(heads), *cells)]


def as_html(account: Account, name: str) -> str:
    """The report as an HTML page without any other file."""
    incidents = incident_rows(account)
    legend = " ".join(
        f'<span class="swatch" style="background:{COLOURS[group]}"></span>{html.escape(group)}&nbsp;&nbsp;'
        for group in COLOURS
        if group in account.groups
    )
    return PAGE.format(
        title=html.escape(f"Report of {name}"),
        headline=html.escape(headline(account)),
        timeline=timeline(account),
        legend=legend,
        parts=_html_table(("What", "Time", "Share"), part_rows(account), numbers=(1, 2)),
        stragglers=_html_list([str(found["message"]) for found in account.stragglers]),
        incidents=_html_table(INCIDENT_HEADS, incidents, numbers=(7,)) if incidents else "<p>None.</p>",
    )


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="number">{html.escape(cell)}</td>' if index in numbers else f"<td>{html.escape(cell)}</td>"
            for index, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _html_list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>" if lines else "<p>None.</p>"


def timeline(account: Account) -> str:
    """An SVG picture: a row for what lies before and between attempts, and one for each attempt."""
    wall = account.wall or 1.0
    rows = ["others", *(span.name for span in account.spans if span.name.startswith("attempt"))]
    first = account.spans[0].begin if account.spans else 0.0
    shapes = []
    counted = iter(range(1, len(rows)))
    for span in account.spans:
        row = next(counted) if span.name.startswith("attempt") else 0
        shapes.append(_bar(span, LABEL + (span.begin - first) / wall * WIDTH, row * ROW, WIDTH / wall))
    labels = [f'<text x="0" y="{index * ROW + 16}">{html.escape(name)}</text>' for index, name in enumerate(rows)]
    size = f'width="{LABEL + WIDTH}" height="{len(rows) * ROW}" viewBox="0 0 {LABEL + WIDTH} {len(rows) * ROW}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}>{"".join(labels)}{"".join(shapes)}</svg>'


def _bar(span: Span, x: float, y: float, scale: float) -> str:
    """A span as one bar: what it was spent on side by side, not in the order of time within it."""
    shares: dict[str, float] = {}
    for name, seconds in span.parts.items():
        group = name.partition(":")[0]
        shares[group] = shares.get(group, 0.0) + seconds
    title = "; ".join(f"{name} {seconds:,.1f} s" for name, seconds in span.parts.items() if seconds > 0)
    shapes = []
    for group in sorted(shares, key=ORDER.index):
        width = shares[group] * scale
        shapes.append(f'<rect x="{x:.2f}" y="{y + 3}" width="{width:.2f}" height="20" fill="{COLOURS[group]}"/>')
        x += width
    return f"<g><title>{html.escape(f'{span.name} {span.outcome}: {title}')}</title>{''.join(shapes)}</g>"
