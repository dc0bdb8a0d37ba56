"""Small HTML builders: everything a user wrote is escaped here, nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Any


@dataclass(frozen=True)
class Section:
    """One card of the page. `body` is HTML; `title` and `lead` are text."""

    anchor: str
    title: str
    lead: str
    body: str

    def render(self) -> str:
        """The <section> element."""
        return (
            f'<section id="{self.anchor}"><h2>{escape(self.title)}</h2>'
            f'<p class="lead">{escape(self.lead)}</p>\n{self.body}\n</section>'
        )


def figure(drawing: str, caption: str, *, alone: bool = False) -> str:
    """An inline SVG with its caption: below it, or beside it for a figure that stands alone."""
    kind = ' class="alone"' if alone else ""
    return f"<figure{kind}>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def pair(figures: Iterable[str]) -> str:
    """Figures side by side where there is room, one above the other where not."""
    return f'<div class="pair">{"".join(figures)}</div>'


def cards(rows: Sequence[tuple[str, str, str]]) -> str:
    """(label, value, note) triples as the row of large numbers under the heading."""
    items = "".join(
        f'<li><span class="label">{escape(label)}</span><span class="value">{escape(value)}</span>'
        f'<span class="note">{escape(note)}</span></li>'
        for label, value, note in rows
    )
    return f'<ul class="cards">{items}</ul>' if items else ""


def facts_table(rows: Mapping[str, Any]) -> str:
    """Name-value pairs; values of any JSON type are written as text."""
    lines = "".join(
        f'<tr><th scope="row"><code>{escape(str(name))}</code></th>'
        f"<td>{escape(text(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f'<div class="scroll"><table class="facts-table"><tbody>{lines}</tbody></table></div>'


def text(value: Any) -> str:
    """A JSON value as a reader wants it: lists with commas, mappings as `name: value`."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {text(entry)}" for key, entry in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(text(entry) for entry in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def details(summary: str, body: str) -> str:
    """A fold with `summary` as its visible line; `body` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def page(*, title: str, facts: str, cards: str, sections: Sequence[Section]) -> str:
    """The whole document: template.html filled, style.css inlined, no external reference."""
    here = files("citi.report")
    links = "".join(f'<a href="#{part.anchor}">{escape(part.title)}</a>' for part in sections)
    return Template(here.joinpath("template.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"CITI run report: {title}"),
        style=here.joinpath("style.css").read_text(encoding="utf-8"),
        heading=escape(title),
        facts=escape(facts),
        cards=cards,
        contents=f'<nav aria-label="Contents">{links}</nav>',
        sections="\n".join(part.render() for part in sections),
    )
