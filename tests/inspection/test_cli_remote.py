"""Inspection of a cache at a URL prints what it prints for the folder."""

import pytest

from cache.make import make_cache
from llava_twophase.inspection.cli import main


@pytest.mark.parametrize(
    "command",
    [["summary"], ["stats", "--n", "4"], ["head", "00000/picture 0.jpg"], ["verify"], ["summary", "--json"]],
    ids=" ".join,
)
def test_inspection_of_a_url_prints_what_it_prints_for_the_folder(web, tmp_path, capsys, command):
    path, _, _ = make_cache(tmp_path / "cache", (4, 4))
    name, *arguments = command
    assert main([name, str(path), *arguments]) == 0
    expected = capsys.readouterr().out.replace(str(path), f"{web.url}/cache")
    assert main([name, f"{web.url}/cache", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.split() == expected.split()
    assert printed
