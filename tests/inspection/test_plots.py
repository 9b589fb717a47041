"""Plots of statistics as files, and errors without matplotlib."""

import sys

import pytest

from inspection.command import inspect
from inspection.values import cache_of, random_values


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot_is_written_in_the_format_of_its_suffix(suffix, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot.{suffix}"
    inspect("stats", cache_of(tmp_path / "cache", random_values()), "--plot", path)
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start) and len(list(tmp_path.iterdir())) == 2


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    cache = cache_of(tmp_path / "cache", random_values())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = inspect("stats", cache, "--plot", tmp_path / "p.png", expect=1)
    assert result.stderr == "error: plots need matplotlib: pip install 'llava-twophase[plots]'\n"
    report = inspect("report", cache, "-o", tmp_path / "r.html")
    assert "warning: the report has no plots" in report.stderr
    assert "No plots" in (tmp_path / "r.html").read_text(encoding="utf-8")
