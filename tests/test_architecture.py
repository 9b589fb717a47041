"""The rules of docs/architecture.md: imports, sizes, the mirror in tests/, and which module may use what.

ruff asserts three more: at most eight parameters (PLR0913), no private members of others (SLF001), no star imports.
"""

import ast
import functools
import importlib.util
import re

import pytest

from helpers import ROOT, SCRIPTS, project, run

PACKAGE = ROOT / "llava_twophase"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")])
TESTS = sorted(path for path in (ROOT / "tests").rglob("*.py") if "golden" not in path.parts)
UNMIRRORED = {ROOT / "tests", ROOT / "tests" / "cluster"}
MODULE_LINES = 300
FUNCTION_LINES = 50
# The tower inside the training step, and a cache compared with the tower that made it.
VISION_IN_TRAIN = {"train/data/on_the_fly.py", "train/data/tower_check.py"}
# The inspection counts the captions that training truncates.
CAPTION_TEMPLATE = ("llava_twophase.train.data.conversation", "llava_twophase.train.data.tokenizer")
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed")
# Documented, though not exported at the top of the library.
DOCUMENTED = {"transformers.utils.logging", "transformers.training_args.OptimizerNames"}


def name_of(path):
    """Return a path relative to the package, or to the repository for other files."""
    return str(path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT))


@functools.cache
def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path):
    """Return the dotted name a source file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(node, path):
    """Return the dotted names that one import statement reaches: for `from a import b` both `a` and `a.b`."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
    return {base} | {f"{base}.{alias.name}" for alias in node.names}


def is_type_checking(node):
    """Return whether a statement is `if TYPE_CHECKING:`, which never runs."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def import_statements(node, at_import_only):
    """Yield the import statements below `node`; with `at_import_only` those that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if at_import_only and (
            isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or is_type_checking(child)
        ):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        yield from import_statements(child, at_import_only)


def imports(path, at_import_only=False):
    """Return all dotted names that a source file imports."""
    return {name for node in import_statements(parse(path), at_import_only) for name in imported_by(node, path)}


def importers(folder, *forbidden, at_import_only=False, allowed=()):
    """Return "file: name" for each file below `folder` ("" for the package) that imports one of `forbidden`."""
    return [
        f"{name_of(path)}: {name}"
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        if name_of(path) not in allowed
        for name in sorted(imports(path, at_import_only))
        if any(name == prefix or name.startswith(prefix + ".") for prefix in forbidden)
    ]


def test_every_folder_of_the_architecture_exists():
    assert {"vision", "cache", "projectors", "extract", "train", "inspection", "deploy"} <= {
        path.name for path in PACKAGE.iterdir()
    }


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("cache", ["extract", "train", "vision", "inspection", "deploy", "projectors"]),
        ("vision", ["cache", "extract", "train", "inspection", "deploy"]),
        ("extract", ["train", "inspection", "deploy"]),
        ("train", ["extract", "inspection", "deploy"]),
        ("inspection", ["extract", "train", "deploy"]),
        ("deploy", ["extract", "inspection"]),
        ("projectors", ["cache", "extract", "train", "vision", "inspection", "deploy"]),
    ],
)
def test_layers(folder, forbidden):
    found = importers(folder, *(f"llava_twophase.{name}" for name in forbidden))
    if folder == "inspection":
        found = [line for line in found if not line.partition(": ")[2].startswith(CAPTION_TEMPLATE)]
    assert sorted(found) == []


def test_cache_imports_no_model_library():
    assert importers("cache", "transformers", "torch.nn", "torchvision", "accelerate", "deepspeed") == []


def test_cache_imports_torch_only_inside_functions():
    assert importers("cache", "torch", at_import_only=True) == []


def test_training_imports_vision_only_for_on_the_fly_features():
    assert importers("train", "llava_twophase.vision", allowed=VISION_IN_TRAIN) == []


def test_nothing_imports_pipelines():
    assert importers("", "pipelines") == []


def test_only_hdf5_imports_h5py():
    assert importers("", "h5py", allowed={"cache/hdf5.py"}) == []


def test_only_a_cache_session_writes_a_manifest():
    found = importers("", "llava_twophase.cache.manifest.write_manifest", allowed={"cache/session.py"})
    assert sorted(found) == []


def test_only_cli_modules_and_their_parser_use_argparse_namespaces():
    found = {
        name_of(path)
        for path in SOURCES
        if PACKAGE in path.parents and path.name != "cli.py" and path != PACKAGE / "command_line.py"
        for node in ast.walk(parse(path))
        if "Namespace" in (getattr(node, "attr", None), getattr(node, "id", None), getattr(node, "name", None))
    }
    assert sorted(found) == []


def is_private(dotted):
    """Return whether a part of a dotted name begins with one underscore."""
    return any(part.startswith("_") and not part.startswith("__") for part in dotted.split("."))


def undocumented(path):
    """Yield the undocumented names of the four libraries in a file, and private names given as keywords or strings."""
    for node in import_statements(parse(path), at_import_only=False):
        base = getattr(node, "module", None)
        for alias in node.names:
            name = f"{base}.{alias.name}" if base else alias.name
            if name.split(".")[0] in LIBRARIES and name not in DOCUMENTED:
                below = name.startswith("transformers.") and (base or name).count(".") > 0
                if below or is_private(name):
                    yield name
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.keyword) and node.arg and is_private(node.arg):
            yield f"{node.arg}="
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield f"{ast.unparse(node.func)} {name.value}"


def test_only_callbacks_of_libraries_ignore_their_arguments():
    """A method that takes ``*_`` or ``**_`` fits every protocol by mypy's rules, whatever its callers pass."""
    found = {
        f"{name_of(path)}: {node.name}"
        for path in SOURCES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("on_") and node.name != "__exit__"
        for argument in (node.args.vararg, node.args.kwarg)
        if argument is not None and not argument.arg.strip("_")
    }
    assert sorted(found) == []


def test_undocumented_api_is_in_compat():
    found = {f"{name_of(path)}: {use}" for path in SOURCES if path.name != "compat.py" for use in undocumented(path)}
    assert sorted(found) == []


def test_modules_are_short():
    found = {name_of(path) for path in SOURCES if len(path.read_text(encoding="utf-8").splitlines()) > MODULE_LINES}
    assert sorted(found) == []


def test_functions_are_short():
    found = {
        f"{name_of(path)}: {node.name}"
        for path in SOURCES
        for node in ast.walk(parse(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    }
    assert sorted(found) == []


def test_no_assignment_sets_more_than_two_attributes():
    found = {
        f"{name_of(path)}:{node.lineno}"
        for path in [*SOURCES, *TESTS]
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Store)
        if sum(isinstance(element, ast.Attribute) for element in node.elts) > 2
    }
    assert sorted(found) == []


def mirrors_a_module(path):
    """Return whether tests/<folder>/test_<module>[_<topic>].py tests llava_twophase/<folder>/<module>.py."""
    folder = PACKAGE / path.parent.relative_to(ROOT / "tests")
    topic = path.stem.removeprefix("test_")
    return any(topic == module.stem or topic.startswith(module.stem + "_") for module in folder.glob("*.py"))


def test_tests_mirror_the_package():
    found = {
        name_of(path)
        for path in TESTS
        if path.name.startswith("test_") and path.parent not in UNMIRRORED and not mirrors_a_module(path)
    }
    assert sorted(found) == []


def test_no_test_imports_from_a_test_module():
    found = {
        f"{name_of(path)}: {name}"
        for path in TESTS
        for name in imports(path)
        if re.fullmatch(r"test_\w+", name.split(".")[-1])
    }
    assert sorted(found) == []


def test_importing_the_package_loads_no_torch():
    code = "import sys, llava_twophase; print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    assert run(["python", "-c", code]).stdout == "[]\n"


@pytest.mark.parametrize("entry", [*project()["scripts"].values(), "llava_twophase.deploy.cli:main evaluate"])
def test_help_loads_no_torch(entry):
    entry, *subcommand = entry.split()
    module, _, function = entry.partition(":")
    code = f"""
import sys
from {module} import {function}
try:
    code = {function}([*{subcommand}, "--help"])
except SystemExit as stop:
    code = stop.code
print(code or 0, sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    assert run(["python", "-c", code]).stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_scripts_only_call_the_package(script):
    """The scripts and the console commands are one program: a script is a docstring, two imports and the call."""
    kinds = [type(node).__name__ for node in parse(ROOT / script).body]
    assert kinds == ["Expr", "Import", "ImportFrom", "If"]
