"""Plots of a cache's statistics by matplotlib, an extra: for a file, or inline in a page that may be dark or light."""

from __future__ import annotations

import io
import re
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_twophase.errors import UserError
from llava_twophase.inspection import output
from llava_twophase.inspection.pictures import patch_grid
from llava_twophase.inspection.statistics import OUTLIER_CHANNEL, OUTLIER_TOKEN, Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and vermilion of Okabe and Ito's palette: told apart by colour-blind eyes, and by their markers.
_INK, _SERIES, _MARKED = "black", "#0072b2", "#d55e00"
# Stand-ins that the page's own colours take the place of, for either theme.
_INLINE = {"#010203": "currentColor", "#010204": "var(--series)", "#010205": "var(--marked)"}


def missing() -> str | None:
    """Say what to install where matplotlib is not."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return "plots need matplotlib: pip install 'llava-twophase[plots]'"
    return None


def save(path: str, measured: Measured) -> None:
    """Write the plots to one file, its format by its suffix.

    Raises:
        UserError: matplotlib is absent, or the file cannot be written.
    """
    reason = missing()
    if reason:
        raise UserError(reason)
    from matplotlib.figure import Figure

    drawn = _plots(measured)
    figure = Figure(figsize=(5.2 * len(drawn), 3.4), layout="constrained")
    for number, draw in enumerate(drawn.values(), 1):
        draw(figure.add_subplot(1, len(drawn), number), (_INK, _SERIES, _MARKED))
    _, _, suffix = path.rpartition(".")
    output.write_file(path, lambda file: figure.savefig(file, format=suffix.lower(), dpi=120))


def inline(measured: Measured) -> dict[str, str]:
    """Draw the plots for a page: title to SVG, in the page's ``currentColor``, ``--series`` and ``--marked``."""
    from matplotlib.figure import Figure

    found = {}
    for title, draw in _plots(measured).items():
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.add_subplot()
        ink, series, marked = _INLINE
        draw(axes, (ink, series, marked))
        axes.set_title("")
        found[title] = _svg(figure, title)
    return found


def words(counts: dict[str, int]) -> str:
    """Draw a histogram of caption lengths for a page."""
    from matplotlib.figure import Figure

    ink, series, _ = _INLINE
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.bar([*counts], [*counts.values()], color=series)
    _label(axes, ink, "", "words of a caption", "records")
    axes.tick_params(axis="x", rotation=30)
    return _svg(figure, "words")


def _plots(measured: Measured) -> dict[str, Any]:
    found = {"channels": _channels(measured), "token norms": _norms(measured)}
    norms = np.nan_to_num(measured.norms).mean(0)
    try:
        grid = patch_grid(norms[:, None], str(measured.rows.cache.fingerprint.get("select_feature")))[..., 0]
    except UserError:
        return found
    return {**found, "mean norm by place": _places(grid)} if isqrt(grid.size) > 1 else found


def _channels(measured: Measured) -> Any:
    def draw(axes: Axes, colours: tuple[str, str, str]) -> None:
        rms = measured.channel_rms
        strong = rms > OUTLIER_CHANNEL * np.median(rms)
        places = np.arange(len(rms))
        axes.plot(places[~strong], rms[~strong], ".", color=colours[1], markersize=3)
        axes.plot(places[strong], rms[strong], "^", color=colours[2], markersize=7)
        for place in places[strong][np.argsort(-rms[strong])][:5]:
            at = (place, rms[place])
            axes.annotate(str(place), at, (5, 0), textcoords="offset points", color=colours[0], fontsize=8, va="center")
        if (rms > 0).any():
            axes.set_yscale("log")
        _label(axes, colours[0], "channels", "channel", "root mean square")

    return draw


def _norms(measured: Measured) -> Any:
    def draw(axes: Axes, colours: tuple[str, str, str]) -> None:
        norms = measured.norms[np.isfinite(measured.norms)]
        if len(norms):
            # Numbers of 16 bits lie close together: without room, numpy finds no bins between them.
            low, high = float(norms.min()), float(norms.max())
            edges = np.linspace(low, high if high > low else low + 1, 49)
            counts, _ = np.histogram(norms, edges)
            axes.stairs(counts, edges, fill=True, color=colours[1])
            limit = OUTLIER_TOKEN * float(np.median(norms))
            if limit <= edges[-1]:
                axes.axvline(limit, color=colours[2], linestyle="--")
            axes.set_yscale("symlog")
        _label(axes, colours[0], "token norms", "norm", "tokens")

    return draw


def _places(grid: np.ndarray) -> Any:
    def draw(axes: Axes, colours: tuple[str, str, str]) -> None:
        image = axes.imshow(grid, cmap="cividis")
        bar = axes.figure.colorbar(image, ax=axes)
        bar.ax.tick_params(colors=colours[0])
        _label(axes, colours[0], "mean norm by place", "column", "row")

    return draw


def _label(axes: Axes, ink: str, title: str, x: str, y: str) -> None:
    axes.set_title(title, color=ink)
    axes.set_xlabel(x, color=ink)
    axes.set_ylabel(y, color=ink)
    axes.tick_params(which="both", colors=ink)
    for spine in axes.spines.values():
        spine.set_color(ink)


def _svg(figure: Figure, name: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for stand_in, colour in _INLINE.items():
        text = text.replace(stand_in, colour)
    # Some ids are the same in every figure; in one page each must be its own.
    own = name.replace(" ", "-")
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{own}-", text)
