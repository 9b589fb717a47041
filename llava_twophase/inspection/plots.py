"""Plots of a cache's statistics, for a file or for a page.

Shapes: N images sampled, L tokens, D width, G the side of the patch grid.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_twophase.errors import UserError
from llava_twophase.inspection import output
from llava_twophase.inspection.pictures import patch_grid
from llava_twophase.inspection.statistics import OUTLIER_CHANNEL, OUTLIER_TOKEN, SampleStatistics
from llava_twophase.plots import INLINE, PAPER, Colours, inline_svg, label_axes, missing_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw = Callable[["Axes", Colours], None]


def save(path: str, measured: SampleStatistics) -> None:
    """Write the plots to one file, in the format of its suffix.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    reason = missing_matplotlib()
    if reason:
        raise UserError(reason)
    from matplotlib.figure import Figure

    plots = _plots(measured)
    figure = Figure(figsize=(5.2 * len(plots), 3.4), layout="constrained")
    for number, (title, draw) in enumerate(plots.items(), 1):
        axes = figure.add_subplot(1, len(plots), number)
        axes.set_title(title)
        draw(axes, PAPER)
    _, _, suffix = path.rpartition(".")
    output.write_file(path, lambda file: figure.savefig(file, format=suffix.lower(), dpi=120))


def inline(measured: SampleStatistics) -> dict[str, str]:
    """Draw the plots for a page: title to SVG."""
    return {title: _inline(title, draw) for title, draw in _plots(measured).items()}


def inline_words(counts: dict[str, int]) -> str:
    """Draw a histogram of caption lengths for a page."""

    def draw(axes: Axes, colours: Colours) -> None:
        axes.bar([*counts], [*counts.values()], color=colours.series)
        label_axes(axes, colours.ink, "words of a caption", "records")
        axes.tick_params(axis="x", rotation=30)

    return _inline("words", draw)


def _inline(name: str, draw: Draw) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    draw(figure.add_subplot(), INLINE)
    return inline_svg(figure, name)


def _plots(measured: SampleStatistics) -> dict[str, Draw]:
    found = {"channels": _channels(measured), "token norms": _norms(measured)}
    norms = np.nan_to_num(measured.norms).mean(0)
    try:
        grid = patch_grid(norms[:, None], measured.rows.cache.fingerprint.get("select_feature"))[..., 0]
    except UserError:
        return found
    return {**found, "mean norm by place": _places(grid)} if isqrt(grid.size) > 1 else found


def _channels(measured: SampleStatistics) -> Draw:
    def draw(axes: Axes, colours: Colours) -> None:
        rms = measured.channel_rms
        strong = rms > OUTLIER_CHANNEL * np.median(rms)
        channels = np.arange(len(rms))
        axes.plot(channels[~strong], rms[~strong], ".", color=colours.series, markersize=3)
        axes.plot(channels[strong], rms[strong], "^", color=colours.marked, markersize=7)
        text: dict[str, Any] = {"textcoords": "offset points", "color": colours.ink, "fontsize": 8, "va": "center"}
        for channel in channels[strong][np.argsort(-rms[strong])][:5]:
            axes.annotate(str(channel), (channel, rms[channel]), (5, 0), **text)
        if (rms > 0).any():
            axes.set_yscale("log")
        label_axes(axes, colours.ink, "channel", "root mean square")

    return draw


def _norms(measured: SampleStatistics) -> Draw:
    def draw(axes: Axes, colours: Colours) -> None:
        norms = measured.norms[np.isfinite(measured.norms)]
        if len(norms):
            # 16-bit values are close together: where low equals high, numpy has no room for bins.
            low, high = float(norms.min()), float(norms.max())
            edges = np.linspace(low, high if high > low else low + 1, 49)
            counts, _ = np.histogram(norms, edges)
            axes.stairs(counts, edges, fill=True, color=colours.series)
            limit = OUTLIER_TOKEN * float(np.median(norms))
            if limit <= edges[-1]:
                axes.axvline(limit, color=colours.marked, linestyle="--")
            axes.set_yscale("symlog")
        label_axes(axes, colours.ink, "norm", "tokens")

    return draw


def _places(grid: np.ndarray) -> Draw:
    def draw(axes: Axes, colours: Colours) -> None:
        image = axes.imshow(grid, cmap="cividis")
        bar = axes.figure.colorbar(image, ax=axes)
        bar.ax.tick_params(colors=colours.ink)
        label_axes(axes, colours.ink, "column", "row")

    return draw
