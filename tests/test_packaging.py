"""What is installed: commands, pinned versions, targets and the version number agree with each other."""

import importlib
import re
import shutil
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import llava_twophase
from helpers import ROOT, SCRIPTS, project, run

PROJECT = project()
EXTRAS = PROJECT["optional-dependencies"]
UNPINNED = {"wandb", "tensorboard"}  # trackers: services and viewers that no test starts


def pinned():
    """{canonical name: requirement} of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def test_one_command_for_each_script():
    assert PROJECT["scripts"].keys() == SCRIPTS.keys()
    for command, target in PROJECT["scripts"].items():
        module = target.partition(":")[0]
        assert f"from {module} import main" in (ROOT / SCRIPTS[command]).read_text(encoding="utf-8")


@pytest.mark.parametrize("target", PROJECT["scripts"].values())
def test_console_scripts_resolve(target):
    module, _, name = target.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize(("command", "script"), SCRIPTS.items())
def test_help_ends_with_an_example(command, script):
    text = run(["python", script, "--help"]).stdout
    _, found, last_part = text.rpartition("xample")
    assert found and (command in last_part or script in last_part), f"no example at the end:\n{text[-1500:]}"
    assert not re.search(r"\\[ \t]+\S", last_part), f"wrapped, so it cannot be pasted:\n{last_part}"


def test_wrong_usage_is_exit_code_2():
    for script in SCRIPTS.values():
        assert "usage: " in run(["python", script, "--no-such-flag"], expect=2).stderr


def test_every_direct_dependency_is_pinned_within_its_range():
    pins = pinned()
    wanted = PROJECT["dependencies"] + [line for name in sorted(EXTRAS.keys() - UNPINNED) for line in EXTRAS[name]]
    for line in wanted:
        requirement = Requirement(line)
        pin = pins[canonicalize_name(requirement.name)]
        (version,) = [specifier.version for specifier in pin.specifier]
        assert requirement.specifier.contains(version), f"{pin} is outside {requirement}"


def test_pins_are_exact_and_public():
    for requirement in pinned().values():
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), f"{requirement}: one public version, please"


def test_the_promised_extras_exist():
    runtime = {"wandb", "tensorboard", "plots", "demo", "evaluate", "gguf", "gpu", "parquet", "remote"}
    assert EXTRAS.keys() == {*runtime, "test", "dev", "bench"}


def test_readme_lists_the_extras_of_users():
    listed = re.search(r"# extras: (.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(listed[1].split(", ")) == EXTRAS.keys() - {"test", "dev", "bench", "demo"}


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    printed = run(["make", "--no-print-directory"]).stdout
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE).group(1).split())
    assert targets == set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    assert targets == set(re.findall(r"^make ([a-z-]+) ", printed, flags=re.MULTILINE))


def test_changelog_begins_with_this_version_after_unreleased():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    released = headings[1:] if headings[0] == "Unreleased" else headings
    assert released[0] == llava_twophase.__version__


def test_workflow_tests_the_oldest_supported_python():
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    tested = re.findall(r"3\.\d+", re.search(r"^ +python: (.*)$", workflow, flags=re.MULTILINE)[1])
    assert PROJECT["requires-python"] == f">={tested[0]}"
    assert f"sys.version_info < ({tested[0].replace('.', ', ')})" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_wheel_contains_every_module_and_py_typed(tmp_path):
    """Built from a copy, because setuptools writes build/ beside the sources."""
    for name in ("llava_twophase", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    name = run(["python", "-c", build], cwd=tmp_path).stdout.split()[-1]
    packed = set(zipfile.ZipFile(tmp_path / name).namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "llava_twophase").rglob("*.py")}
    assert sources | {"llava_twophase/py.typed"} <= packed
