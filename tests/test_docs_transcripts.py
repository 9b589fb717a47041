"""The pages' transcripts: commands in console blocks, run again, print what the page shows."""

import re

import pytest

from docs_transcripts import INSPECT, PAGES, blocks, output, prepare
from inspection.command import SUBCOMMANDS

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
# What differs from machine to machine: versions, age, device, hashes of files that Pillow wrote, what limits the speed.
VOLATILE = re.compile(
    r"^disk |^  (age|device|torch|provenance\.software|software\.|command|made from)|sha256|^bound by", re.MULTILINE
)


def compared(text):
    """Return a text with # for each number, and the numbers; without lines that differ from machine to machine."""
    lines = [line for line in text.splitlines() if line.strip() and not VOLATILE.search(line)]
    joined = "\n".join(re.sub(r" +", " ", line) for line in lines)
    return NUMBER.sub("#", joined), [float(number.replace(",", "")) for number in NUMBER.findall(joined)]


def test_inspection_pages_show_every_subcommand():
    shown = {command.split()[1] for page in INSPECT for command, _ in blocks(page)}
    assert shown == set(SUBCOMMANDS) - {"push", "pull"}  # they need a server: tests/inspection/test_transfer.py


@pytest.mark.parametrize("page", PAGES)
def test_commands_print_what_the_page_shows(page, tmp_path):
    prepare(tmp_path, page)
    assert blocks(page)
    for command, shown in blocks(page):
        words, numbers = compared(output(command, tmp_path))
        shown_words, shown_numbers = compared(shown)
        if page in INSPECT:  # other CPUs and releases round differently, and their Pillow writes files of another size
            assert words == shown_words
            assert numbers == pytest.approx(shown_numbers, rel=0.1, abs=0.02)
        else:  # numbers are rates; a busy machine may add a warning, and "..." stands for further lines
            lines = iter(words.splitlines())
            missing = [line for line in shown_words.splitlines() if line != "..." and line not in lines]
            assert missing == [], words
