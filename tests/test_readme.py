"""Keeps the README true: its tree, its commands and every flag it shows."""

import functools
import inspect
import re
import shlex
import subprocess

import numpy as np
import pytest

from cache.make import make_cache
from helpers import ROOT, SCRIPTS, fenced_blocks, run
from llava_twophase.cache import format as cache_format
from llava_twophase.cache.reader import FeatureCache

COMMANDS = {**SCRIPTS, **{script: script for script in SCRIPTS.values()}}
INSPECT = SCRIPTS["llava-inspect-cache"]
TREE_LINE = re.compile(r"(?P<indent>(?:│   |    )*(?:[├└]── )?)(?P<name>[^\s#│├└]+)(?:\s+(?:#\s*)?(?P<text>.*))?")


@functools.cache
def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


@functools.cache
def help_text(script, *subcommand):
    return run(["python", script, *subcommand, "--help"]).stdout


@functools.cache
def subcommands():
    """What inspect_cache.py offers, read off the {a,b,c} in its usage line."""
    return re.search(r"\{([\w,-]+)\}", help_text(INSPECT)).group(1).split(",")


def tree():
    """{path: description} of the block that starts with `llava_twophase/`; folders end in a slash."""
    (block,) = [block for block in fenced_blocks(readme(), r"\w*") if block.startswith("llava_twophase/")]
    described, parents = {}, []
    for line in block.splitlines():
        if not line.strip(" │"):
            continue
        match = TREE_LINE.fullmatch(line.rstrip())
        assert match, f"not a line of a tree: {line!r}"
        depth = len(match["indent"]) // 4
        path = "".join(parents[:depth]) + match["name"]
        assert path not in described, f"{path} stands twice in the tree"
        described[path] = match["text"] or ""
        parents[depth:] = [match["name"]] if path.endswith("/") else []
    return described


def tracked():
    """Files of the package and of pipelines that git has, or would take with `git add`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "llava_twophase", "pipelines"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    if result.returncode:
        pytest.skip("not a git checkout")
    return {name for name in result.stdout.split("\0") if name and (ROOT / name).exists()}


def command_lines():
    """Every command of the README's bash blocks, continuation lines joined, prompts and comments dropped."""
    blocks = "\n".join(fenced_blocks(readme(), "bash"))
    lines = re.sub(r"\\\n", " ", blocks).splitlines()
    return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]


def our_commands():
    """(script, its arguments) of each of our commands in the README; what stands before the script is a launcher's."""
    found = []
    for words in command_lines():
        places = [index for index, word in enumerate(words) if word in COMMANDS]
        if places:
            found.append((COMMANDS[words[places[0]]], words[places[0] + 1 :]))
    return found


def test_the_format_is_the_one_of_the_package():
    rules = inspect.cleandoc(cache_format.__doc__).partition("\n\n")[2]
    assert rules.count("MUST") > 15 and rules in readme()


def test_the_example_reads_a_shard(tmp_path):
    cache, keys, stored = make_cache(tmp_path / "cache", counts=(8,))
    (example,) = [block for block in fenced_blocks(readme(), "python") if "offset" in block]
    found = {}
    exec(example.replace("caches/clip-l-336", str(cache)), found)
    np.testing.assert_array_equal(found["bits"].reshape(stored[5].shape), stored[5])
    np.testing.assert_array_equal(found["values"], FeatureCache(cache).values([keys[5]])[0])


def test_the_tree_lists_every_file():
    # A package's __init__.py is what the folder's own line describes.
    named = {path for path in tree() if not path.endswith("/") and path.startswith(("llava_twophase/", "pipelines/"))}
    packages = {name for name in tracked() if name.endswith("/__init__.py") and name.count("/") > 1}
    assert named - packages == tracked() - packages


def test_the_tree_describes_every_line():
    top = {"llava_twophase/", "pipelines/", "tests/"}
    assert [path for path, text in tree().items() if not text and path not in top] == []


def test_the_readme_shows_each_command():
    assert {script for script, _ in our_commands()} == set(SCRIPTS.values())


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_console_script_is_mentioned(name):
    assert name in readme()


def test_every_flag_shown_exists():
    unknown = []
    for script, words in our_commands():
        subcommand = words[:1] if script == INSPECT else []
        known = set(re.findall(r"(?<![\w-])--?[a-zA-Z]\w*(?:-\w+)*", help_text(script, *subcommand)))
        flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
        unknown += [f"{script} {' '.join(subcommand)} {flag}" for flag in sorted(flags - known)]
    assert unknown == []


def test_every_subcommand_of_inspection_is_shown():
    assert {words[0] for script, words in our_commands() if script == INSPECT} == set(subcommands())


def test_every_make_target_and_variable_shown_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shown = {word for words in command_lines() if words[0] == "make" for word in words[1:]}
    targets = {word for word in shown if "=" not in word}
    assert {"test", "demo"} <= targets <= set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    variables = {word.partition("=")[0] for word in shown - targets}
    assert variables <= set(re.findall(r"^([A-Z_]+) \?=", makefile, flags=re.MULTILINE))


def test_every_path_of_ours_exists():
    paths = {word.removeprefix("./") for words in command_lines() for word in words}
    ours = {path for path in paths if path.startswith(("pipelines/", "tests/", "llava_twophase/", ".ci/"))}
    assert [path for path in sorted(ours) if not (ROOT / path).exists()] == []


def test_every_link_to_a_file_leads_somewhere():
    links = re.findall(r"\]\(([^)#\s]+)", readme())
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if not (ROOT / link).exists()] == []
