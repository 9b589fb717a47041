"""Plots by matplotlib, which the extra ``plots`` installs: loss curves, and any figure as SVG inside a page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, Any]]
"""``log_history`` of ``trainer_state.json``: entries with ``step`` and, for some, ``loss`` or ``eval_loss``."""


class Colours(NamedTuple):
    """Matplotlib colours of a plot: text and axes, data, and data that is marked."""

    ink: str
    series: str
    marked: str


# Blue and vermilion of Okabe and Ito's palette, which colour-blind readers can tell apart.
PAPER = Colours("black", "#0072b2", "#d55e00")
INLINE = Colours("#010203", "#010204", "#010205")
"""Placeholders that ``inline_svg`` replaces by CSS variables, so that a plot follows the theme of its page."""
_CSS = dict(zip(INLINE, ("currentColor", "var(--series)", "var(--marked)"), strict=True))


def missing_matplotlib() -> str | None:
    """Return what to install if matplotlib is missing, None if it is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return "plots need matplotlib: pip install 'llava-twophase[plots]'"
    return None


def loss_figure(histories: Mapping[str, History], colours: Colours = PAPER) -> Figure:
    """Draw training and evaluation losses over the steps.

    Args:
        histories: Run name to its log.
        colours: A single run is drawn in them; several runs take matplotlib's colours and a legend of their names.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    single = len(histories) == 1
    for number, (name, history) in enumerate(histories.items()):
        line = colours.series if single else f"C{number % 10}"
        dots = colours.marked if single else line
        label = "loss" if single else _not_hidden(name)
        _curve(axes, history, "loss", color=line, label=label, linestyle=("-", "--", "-.", ":")[number // 10 % 4])
        _curve(axes, history, "eval_loss", color=dots, label=f"{label}, evaluation", marker="o", linestyle=":")
    label_axes(axes, colours.ink, "step", "loss (nats per caption token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(labelcolor=colours.ink, framealpha=0)
    return figure


def label_axes(axes: Axes, ink: str, x: str, y: str) -> None:
    """Label both axes and draw them in one colour."""
    axes.set_xlabel(x, color=ink)
    axes.set_ylabel(y, color=ink)
    axes.tick_params(which="both", colors=ink)
    for spine in axes.spines.values():
        spine.set_color(ink)


def inline_svg(figure: Figure, name: str) -> str:
    """Return a figure that was drawn in ``INLINE`` as SVG.

    Args:
        figure: The figure.
        name: Unique within the page: some ids are equal in all figures, and each gets this prefix.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for placeholder, colour in _CSS.items():
        text = text.replace(placeholder, colour)
    prefix = re.sub(r"\W", "-", name)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)


def _curve(axes: Axes, history: History, name: str, **style: Any) -> None:
    points = [(entry["step"], entry[name]) for entry in history if name in entry]
    if points:
        axes.plot(*zip(*points, strict=True), linewidth=1.2, **style)


def _not_hidden(name: str) -> str:
    # Matplotlib hides labels that start with an underscore, and reads $...$ as a formula.
    return name.replace("$", r"\$").replace("_", " _", 1) if name.startswith("_") else name.replace("$", r"\$")
