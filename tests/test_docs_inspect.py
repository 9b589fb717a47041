"""docs/inspect.md: its commands, run again, print what the page shows."""

import re

import pytest

import docs_inspect as docs
from inspection.command import SUBCOMMANDS

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
# What differs from machine to machine: versions, age, device, and the hashes of files that Pillow wrote.
VOLATILE = re.compile(r"^  (age|device|torch|provenance\.software|software\.|command|made from)|sha256", re.MULTILINE)


def compared(text):
    """Return a text with # for each number, and the numbers; without lines that differ from machine to machine."""
    lines = [line for line in text.splitlines() if not VOLATILE.search(line)]
    joined = "\n".join(re.sub(r" +", " ", line) for line in lines)
    return NUMBER.sub("#", joined), [float(number.replace(",", "")) for number in NUMBER.findall(joined)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("docs")
    docs.prepare(path)
    return path


def test_every_subcommand_is_shown():
    assert {command.split()[1] for command, _ in docs.blocks()} == set(SUBCOMMANDS)


@pytest.mark.parametrize("number", range(len(docs.blocks())), ids=lambda number: docs.blocks()[number][0].split()[1])
def test_command_prints_what_the_page_shows(number, folder):
    command, shown = docs.blocks()[number]
    found = docs.output(command, folder)
    (words, numbers), (shown_words, shown_numbers) = compared(found), compared(shown)
    assert words == shown_words
    # Other CPUs and releases round differently, and their Pillow writes files of another size.
    assert numbers == pytest.approx(shown_numbers, rel=0.1, abs=0.02)
