"""Which releases a run accepts."""

from importlib.metadata import version

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from helpers import project
from llava_twophase.errors import UserError
from llava_twophase.train import versions


def test_ranges_are_those_of_pyproject():
    dependencies = project()["dependencies"]
    declared = {r.name: r.specifier for r in map(Requirement, dependencies)}
    assert {name: Requirement(f"{name}{text}").specifier for name, text in versions.SUPPORTED.items()} == {
        name: declared[name] for name in versions.SUPPORTED
    }


def test_installed_releases_are_accepted():
    versions.require_supported()
    for name, text in versions.SUPPORTED.items():
        assert SpecifierSet(text).contains(version(name), prereleases=True), name


def test_another_release_is_refused_with_a_sentence(monkeypatch):
    # A mock: another transformers cannot be installed beside this one.
    monkeypatch.setattr(versions, "version", lambda name: {"transformers": "4.37.2"}.get(name, "2.13.0+cpu"))
    monkeypatch.setitem(versions.SUPPORTED, "deepspeed", ">=0")
    with pytest.raises(
        UserError, match=r"transformers 4\.37\.2 is installed, llava-twophase needs transformers>=5\.24"
    ):
        versions.require_supported()
