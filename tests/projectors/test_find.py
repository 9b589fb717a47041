"""Projector classes are found by name, in the current folder too, and their arguments are compared with the class."""

import hashlib
import sys

import pytest
import torch

from llava_twophase.errors import UserError
from llava_twophase.projectors.find import find_class, source_digests

SOURCE = """
from torch import nn
class Mine(nn.Module):
    def __init__(self, tower, llm, grid, *, tokens=4):
        super().__init__()
        self.layer = nn.Linear(tower, llm)
class Other: pass
value = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with `mine_for_find.py`; sys.path is restored afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "mine_for_find.py").write_text(SOURCE, encoding="utf-8")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("mine_for_find")]:
        del sys.modules[name]


def test_find_class_imports_from_the_current_folder_as_python_m_does(folder):
    found = find_class("mine_for_find:Mine", {"tokens": 9})
    assert found.__module__ == "mine_for_find" and sys.path[0] == str(folder)


def test_find_class_imports_from_a_package(folder):
    package = folder / "mine_for_find_package"
    package.mkdir()
    (package / "inner.py").write_text(SOURCE, encoding="utf-8")
    assert find_class("mine_for_find_package.inner:Mine", {}).__name__ == "Mine"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mlp2x_relu", "is unknown; did you mean mlp2x_gelu. Expected linear, mlpNx_gelu .*, or a class of your own"),
        ("percever", "is unknown; did you mean perceiver. Expected linear"),
        ("zzz", "is unknown; expected linear, mlpNx_gelu .* pixel_shuffle.* or a class of your own"),
        ("", "is unknown"),
        ("mlp0x_gelu", "is unknown"),
        (":Mine", "is unknown"),
        ("mine_for_find:", "is unknown"),
        ("identity", "has no weights"),
        ("no_such_module:Mine", "there is no module no_such_module, neither in the current folder .* PYTHONPATH"),
        ("mine_for_find.inner:Mine", "there is no module mine_for_find.inner"),
        ("mine_for_find:Absent", "the module mine_for_find has no Absent"),
        ("mine_for_find:Other", "has a Other that is not a subclass of nn.Module"),
        ("mine_for_find:value", "has a value that is not a subclass of nn.Module"),
    ],
)
def test_find_class_refuses_what_is_not_a_projector(kind, message, folder):
    with pytest.raises(UserError, match=message):
        find_class(kind, {})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_package", "needs no_such_package, which is not installed"),
        ("1 / 0", r"importing mine_for_find_broken failed: ZeroDivisionError: .*mine_for_find_broken\.py:1"),
        ("class (", "importing mine_for_find_broken failed: SyntaxError"),
    ],
)
def test_find_class_reports_a_module_that_cannot_be_imported(source, message, folder):
    (folder / "mine_for_find_broken.py").write_text(source, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        find_class("mine_for_find_broken:Mine", {})


def test_find_class_refuses_arguments_that_do_not_fit(folder):
    with pytest.raises(UserError, match=r"\"size\": 3.* unexpected keyword argument 'size'.*takes \(tower, llm, grid"):
        find_class("mine_for_find:Mine", {"size": 3})


def test_source_digests_cover_submodules_and_base_classes_without_torch(folder):
    (folder / "mine_for_find_base.py").write_text(
        "from torch import nn\nclass Base(nn.Linear): pass\n", encoding="utf-8"
    )
    (folder / "mine_for_find_top.py").write_text(
        "from mine_for_find_base import Base\nfrom torch import nn\nclass Top(nn.Sequential):\n"
        "    def __init__(self, tower, llm, grid):\n        super().__init__(Base(tower, llm))\n",
        encoding="utf-8",
    )
    projector = find_class("mine_for_find_top:Top", {})(2, 3, None)
    expected = {
        name: hashlib.sha256((folder / f"{name}.py").read_bytes()).hexdigest()
        for name in ("mine_for_find_base", "mine_for_find_top")
    }
    assert source_digests(projector) == expected
    assert source_digests(torch.nn.Linear(1, 1)) == {}
