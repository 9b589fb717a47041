"""Loss curves, and figures inside a page."""

import re

import pytest

from llava_twophase.plots import INLINE, inline_svg, loss_figure

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plots)")

HISTORY = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}, {"step": 2, "eval_loss": 3.5}, {"train_loss": 3.5}]


def lines(figure):
    (axes,) = figure.axes
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_loss_figure_draws_training_and_evaluation_loss():
    assert lines(loss_figure({"run": HISTORY})) == {"loss": ([1, 2], [4.0, 3.0]), "loss, evaluation": ([2], [3.5])}


def test_loss_figure_names_several_runs():
    figure = loss_figure({"_a": HISTORY[:2], "$b$": HISTORY[:1], "c": []})
    assert len(lines(figure)) == 2
    figure.canvas.draw()  # names are not formulas, and none is hidden from the legend
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [" _a", r"\$b\$"]


def test_loss_figure_of_a_run_without_losses_is_drawn():
    figure = loss_figure({"run": []})
    figure.canvas.draw()
    assert lines(figure) == {} and figure.axes[0].get_legend() is None


def test_inline_svg_follows_the_theme_and_has_its_own_ids():
    svg = inline_svg(loss_figure({"run": HISTORY}, INLINE), "loss of a run")
    assert svg.startswith("<svg") and "currentColor" in svg and "var(--series)" in svg and "#01020" not in svg
    assert all(name.startswith("loss-of-a-run-") for name in re.findall(r'\bid="([^"]*)"', svg))
