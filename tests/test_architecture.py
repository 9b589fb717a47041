"""The architecture as assertions: who may import whom, and what stays unloaded."""

import ast
import importlib.util

import pytest

from helpers import ROOT, SCRIPTS, run

PACKAGE = ROOT / "llava_twophase"
SOURCES = sorted(PACKAGE.rglob("*.py"))
VISION_IN_TRAIN = {"train/data/on_the_fly.py"}  # the one place where the tower runs inside the training step


def module_name(path):
    """The dotted name a source file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(node, path):
    """Dotted names one import statement reaches: for `from a import b` both `a` and `a.b`."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
    return {base} | {f"{base}.{alias.name}" for alias in node.names}


def is_type_checking(node):
    """Whether a statement is `if TYPE_CHECKING:`, which never runs."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(node, at_import_only):
    """Every import statement below `node`; with `at_import_only` just those that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if at_import_only and (
            isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or is_type_checking(child)
        ):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        yield from statements(child, at_import_only)


def imports(path, at_import_only=False):
    """All dotted names a source file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return {name for node in statements(tree, at_import_only) for name in imported_by(node, path)}


def offenders(folder, *forbidden, at_import_only=False, allowed=()):
    """Files below `folder` ("" for the whole package) that import one of `forbidden`, as "file: name" lines."""
    return [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        if str(path.relative_to(PACKAGE)) not in allowed
        for name in sorted(imports(path, at_import_only))
        if any(name == prefix or name.startswith(prefix + ".") for prefix in forbidden)
    ]


def test_every_folder_of_the_architecture_is_there():
    assert {"vision", "cache", "extract", "train", "inspection"} <= {path.name for path in PACKAGE.iterdir()}


def test_cache_knows_neither_phase():
    assert offenders("cache", "llava_twophase.extract", "llava_twophase.train", "llava_twophase.vision") == []


def test_cache_uses_no_model_library():
    assert offenders("cache", "transformers", "torch.nn", "torchvision", "accelerate", "deepspeed") == []


def test_cache_loads_torch_only_when_asked_for_a_tensor():
    assert offenders("cache", "torch", at_import_only=True) == []


def test_extract_never_imports_train():
    assert offenders("extract", "llava_twophase.train") == []


def test_train_never_imports_extract():
    assert offenders("train", "llava_twophase.extract") == []


def test_vision_knows_nothing_above_it():
    above = [f"llava_twophase.{name}" for name in ("cache", "extract", "train", "inspection")]
    assert offenders("vision", *above) == []


def test_only_on_the_fly_mode_uses_vision_in_training():
    assert offenders("train", "llava_twophase.vision", allowed=VISION_IN_TRAIN) == []


def test_nothing_imports_pipelines():
    assert offenders("", "pipelines") == []


def test_no_star_imports():
    assert [str(path) for path in SOURCES if any(name.endswith(".*") for name in imports(path))] == []


def test_importing_the_package_loads_no_torch():
    code = "import sys, llava_twophase; print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    assert run(["python", "-c", code]).stdout == "[]\n"


@pytest.mark.parametrize("name", ["extract", "inspection"])
def test_help_loads_no_torch(name):
    code = f"""
import sys
from llava_twophase.{name}.cli import main
try:
    code = main(["--help"])
except SystemExit as stop:
    code = stop.code
print(code or 0, sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    assert run(["python", "-c", code]).stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_scripts_only_call_the_package(script):
    """The scripts and the console commands are one program: a script holds a docstring, two imports and the call."""
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    kinds = [type(node).__name__ for node in tree.body]
    assert kinds == ["Expr", "Import", "ImportFrom", "If"]
