"""Matplotlib figures as inline SVG: deterministic bytes, colours that follow the page's theme."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, ParamSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

# Matplotlib writes these into the SVG; `svg` replaces each by a CSS variable of the page.
INK, MUTED, LINE, PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
TOOL, GENERAL, ACCENT = "#0a0b05", "#0a0b06", "#0a0b07"
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    PAPER: "var(--card)",
    TOOL: "var(--tool)",
    GENERAL: "var(--general)",
    ACCENT: "var(--accent)",
}
_SETTINGS = {
    "text.parse_math": False,  # names of abilities and components may hold dollars
    "svg.fonttype": "none",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def require_matplotlib() -> None:
    """Raises ImportError with the pip line where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "the report's figures need matplotlib: pip install 'citi-kernels[report]'"
        ) from error


def themed(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorator: everything that `draw` makes takes the page's fonts and colours."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **keywords: P.kwargs) -> Figure:
        import matplotlib

        with matplotlib.rc_context(_SETTINGS):
            return draw(*args, **keywords)

    return drawn


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """One panel of `width` x `height` inches, outside pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def svg(figure: Figure, *, name: str, alt: str) -> str:
    """`figure` as an inline <svg> whose ids start with `name`; the same figure, the same bytes."""
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for literal, variable in _VARIABLES.items():
        text = text.replace(literal, variable)
    # A style element counts for the whole page; style.css says the same once.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    # One page holds many figures: ids of one must not answer to another.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    view = re.search(r'viewBox="([^"]+)"', text)
    assert view is not None, "matplotlib wrote an SVG without a viewBox"
    head = f'<svg role="img" aria-label="{escape(alt)}" viewBox="{view.group(1)}">'
    return head + text[text.index(">") + 1 :].strip()
