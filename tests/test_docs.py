"""README.md and docs/: every command, flag, path, link, code example and quoted text is checked."""

import functools
import inspect
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch

import docs_towers
import docs_tree
from cache.make import make_cache
from helpers import ROOT, SCRIPTS, fenced_blocks, run
from llava_twophase.cache import format as cache_format
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.train.model.projector import build_projector, save_projector

PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
COMMANDS = {**SCRIPTS, **{script: script for script in SCRIPTS.values()}}
INSPECT = SCRIPTS["llava-inspect-cache"]
USE = SCRIPTS["llava-use-projector"]
OUR_FOLDERS = ("pipelines/", "tests/", "llava_twophase/", "docs/", ".ci/")


@functools.cache
def text(page):
    return PAGES[page].read_text(encoding="utf-8")


@functools.cache
def help_text(script, *subcommand):
    return run(["python", script, *subcommand, "--help"]).stdout


@functools.cache
def subcommands():
    """Return the subcommands of inspect_cache.py, read from the {a,b,c} in its usage line."""
    return re.search(r"\{([\w,-]+)\}", help_text(INSPECT)).group(1).split(",")


def command_lines(page):
    """Return every command of a page's bash and console blocks as words, with continuation lines joined."""
    script = "\n".join(fenced_blocks(text(page), "bash"))
    lines = re.sub(r"\\\n", " ", script).splitlines()
    transcript = re.sub(r"\\\n", " ", "\n".join(fenced_blocks(text(page), "console"))).splitlines()
    lines += [line.removeprefix("$ ") for line in transcript if line.startswith("$ ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def our_commands(page):
    """Return (script, its arguments) for each of this project's commands on a page, without launchers before it."""
    found = []
    for words in command_lines(page):
        places = [index for index, word in enumerate(words) if word in COMMANDS]
        if places:
            found.append((COMMANDS[words[places[0]]], words[places[0] + 1 :]))
    return found


def anchors(page):
    """Return the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text(page), flags=re.MULTILINE | re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_links_every_page():
    assert [page for page in PAGES if page != "README.md" and f"]({page}" not in text("README.md")] == []


def test_format_page_quotes_the_specification_of_the_package():
    rules = inspect.cleandoc(cache_format.__doc__).partition("\n\n")[2]
    assert rules.count("MUST") > 15 and rules in text("docs/format.md")


def test_format_page_example_reads_a_row(tmp_path):
    cache, keys, stored = make_cache(tmp_path / "cache", counts=(8,))
    (example,) = [block for block in fenced_blocks(text("docs/format.md"), "python") if "offset" in block]
    found = {}
    exec(example.replace("caches/clip-l-336", str(cache)), found)
    np.testing.assert_array_equal(found["bits"].reshape(stored[5].shape), stored[5])
    np.testing.assert_array_equal(found["values"], FeatureCache(cache).read([keys[5]])[0])


def run_examples(page, printed):
    """Run a page's Python blocks one after another; return what they print and the comments beside it."""
    blocks = [block for block in fenced_blocks(text(page), "python") if "offset" not in block]
    found = {}
    for block in blocks:
        exec(compile(block, page, "exec"), found)
    expected = [line.rpartition("  # ")[2] for block in blocks for line in block.splitlines() if "print(" in line]
    return printed().out.splitlines(), expected, found


def test_python_page_examples_run_and_print_what_they_say(tmp_path, monkeypatch, capsys, image_set):
    monkeypatch.chdir(tmp_path)
    shutil.copy(image_set.json, "records.json")
    (tmp_path / "features" / "00000").mkdir(parents=True)
    np.save("features/00000/0.npy", np.ones((4, 8), "f2"))
    (tmp_path / "my-projector").mkdir()
    save_projector(build_projector("mlp2x_gelu", 32, 64), tmp_path / "my-projector")
    names = {"_name_or_path": "an LLM", "mm_vision_tower": "a tower", "mm_projector_type": "mlp2x_gelu"}
    (tmp_path / "my-projector" / "config.json").write_text(json.dumps(names), encoding="utf-8")
    lines, expected, found = run_examples("docs/python-api.md", capsys.readouterr)
    assert len(lines) == len(expected) > 3
    for line, comment in zip(lines, expected, strict=True):
        assert line == comment or "print(" in comment  # a line without a comment prints what depends on the records
    assert found["missing"] == ["no/such.jpg"] and found["tensor"].dtype == torch.bfloat16
    assert torch.equal(found["features"], found["tensor"])
    assert FeatureCache("caches/from-npy").read(["00000/0.jpg"]).sum() == 32


def test_readme_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines, expected, _ = run_examples("README.md", capsys.readouterr)
    assert lines == [expected[0].partition(", float32")[0]] == ["(1, 576, 1024)"]


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_short(page):
    read = docs_tree.BLOCK.sub("", text(page)) if page == "docs/modules.md" else text(page)  # no tree
    assert len(read.splitlines()) <= (200 if page == "README.md" else 250)


def test_modules_page_tree_is_current():
    (block,) = docs_tree.BLOCK.findall(text("docs/modules.md"))
    assert block == docs_tree.tree(), "run: python tests/docs_tree.py"


@pytest.mark.parametrize("page", docs_towers.BLOCKS)
def test_tower_tables_are_made_from_the_families(page):
    assert text(page) == docs_towers.with_blocks(page, text(page)), "run: python tests/docs_towers.py"


def test_tree_describes_every_file():
    lines = docs_tree.tree().splitlines()
    assert [line for line in lines if "#" not in line and line != "llava_twophase/"] == []


def test_every_command_is_shown():
    assert {script for page in PAGES for script, _ in our_commands(page)} == set(SCRIPTS.values())


@pytest.mark.parametrize("name", SCRIPTS)
def test_readme_names_each_console_script(name):
    assert name in text("README.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_exists(page):
    unknown = []
    for script, words in our_commands(page):
        subcommand = words[:1] if script in (INSPECT, USE) else []
        known = set(re.findall(r"(?<![\w-])--?[a-zA-Z]\w*(?:-\w+)*", help_text(script, *subcommand)))
        flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
        unknown += [f"{script} {' '.join(subcommand)} {flag}" for flag in sorted(flags - known)]
    assert unknown == []


def test_every_subcommand_of_inspection_is_shown():
    shown = {words[0] for page in PAGES for script, words in our_commands(page) if script == INSPECT}
    assert shown == set(subcommands())


def test_every_make_target_and_variable_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shown = {word for page in PAGES for words in command_lines(page) if words[0] == "make" for word in words[1:]}
    targets = {word for word in shown if "=" not in word}
    assert {"test", "demo"} <= targets <= set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    variables = {word.partition("=")[0] for word in shown - targets}
    assert variables <= set(re.findall(r"^([A-Z_]+) \?=", makefile, flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_every_path_of_this_repository_exists(page):
    words = {word.removeprefix("./") for words in command_lines(page) for word in words}
    # Also in running text: `pipelines/zero2.json`, `tests/train/test_golden.py`, `python tests/benchmarks/x.py --flag`.
    words |= {word for span in re.findall(r"`([^`\n]+)`", text(page)) for word in span.split()}
    ours = {word for word in words if word.startswith(OUR_FOLDERS)}
    assert [path for path in sorted(ours) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        if not target.exists() or anchor and anchor not in anchors(str(target.relative_to(ROOT))):
            broken.append(link)
    assert broken == []
