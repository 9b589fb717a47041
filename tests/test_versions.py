"""Which releases of the libraries are accepted."""

from importlib.metadata import version

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from helpers import project
from llava_twophase import versions
from llava_twophase.errors import UserError
from llava_twophase.extract import cli


def test_supported_ranges_equal_those_of_pyproject():
    ranges = {r.name: r.specifier for r in map(Requirement, project()["dependencies"])}
    for name, specifier in versions.SUPPORTED.items():
        assert SpecifierSet(specifier) == ranges[name]


def test_require_supported_accepts_the_installed_releases():
    versions.require_supported(*versions.SUPPORTED)
    for name, specifier in versions.SUPPORTED.items():
        assert SpecifierSet(specifier).contains(version(name), prereleases=True), name


def test_require_supported_refuses_another_release(monkeypatch):
    # A mock: another transformers cannot be installed beside this one.
    monkeypatch.setattr(versions, "version", lambda name: {"transformers": "4.37.2"}.get(name, "2.13.0+cpu"))
    with pytest.raises(
        UserError, match=r"transformers 4\.37\.2 is installed, llava-twophase needs transformers>=5\.24"
    ) as caught:
        versions.require_supported("transformers", "torch")
    assert "torch" not in str(caught.value)


def test_extraction_refuses_another_release_of_transformers(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(versions, "version", lambda name: {"transformers": "5.0.0"}.get(name, "2.13.0"))
    flags = {"data_path": tmp_path / "r.json", "image_folder": tmp_path, "vision_tower": "x", "feature_cache": tmp_path}
    code = cli.main([part for name, value in flags.items() for part in (f"--{name}", str(value))])
    assert code == 1
    assert "transformers 5.0.0 is installed, llava-twophase needs transformers>=5.24,<6" in capsys.readouterr().err
