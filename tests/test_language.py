"""Plain technical English: words that readers misunderstand stay out of docstrings, comments, messages and pages."""

import io
import re
import subprocess
import tokenize

import pytest

from helpers import ROOT

# Files whose text still has to be rewritten, as path prefixes.
PENDING: tuple[str, ...] = ()

WORDS = {
    r"anew": "again",
    r"mend(s|ed|ing)?": "fix",
    r"stands? (twice|still|there|again|at|in|beside|before|between|after)": "is, is listed",
    r"(go|goes|going|went) on(?! the\b)": "resume, continue",
    r"h[oe]ld(s|ing)?( it| them| this)? against": "compare with, check against",
    r"sa(y|ys|id|ying) of": "say about, record about",
    r"left out|(leave|leaves|leaving)( it| them| this)? out": "skipped, excluded",
    r"twins?": "duplicate keys, duplicate images",
    r"(?<!there )(?<!There )(is|are|was|were) no (?!one\b|more\b|less\b|\w+er\b)": "is not a, are not",
    r"otherwise (made|than)|made otherwise": "with different settings, differently from",
    r"whole (shard|checkpoint|cache|row|manifest|model)s?|(is|are|not|were|was) whole": "complete, intact",
    r"behind": "after, newer than",
    r"but (for|those of)|all but|none but": "except",
    r"(is|are|was|were|been|be) cut|cut (run|extraction|caption|file|cache)s?": "truncated, interrupted",
    r"(the|its|\w+'s) begin": "start",
    r"(lies|lie) spread|what a kill left|a look tells": "is sharded; leftover files; say what is checked",
    r"(bear|bears|bore|borne)( it| them)? out": "confirm",
    r"tak(e|es|en|ing) (it |them )?in": "add, include",
    r"knows? nothing of": "say what the module does (at most four modules: see below)",
}
# (file, text of the line): uses that are right.
ALLOWED = {
    ("tests/benchmarks/loss_data.py", '"with {} behind"'),  # where it is, in a caption
    ("tests/test_language.py", ""),
}
# Modules in which "knows nothing of" says something surprising.
SURPRISING: tuple[str, ...] = ()
FORBIDDEN = {re.compile(rf"\b({pattern})((?<=\s)|\b)", re.IGNORECASE): advice for pattern, advice in WORDS.items()}


def tracked():
    """Return the text files that git tracks, or would track after `git add`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py", "*.md", "*.sh"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    if result.returncode:
        pytest.skip("not a git checkout")
    return sorted(name for name in result.stdout.split("\0") if name and (ROOT / name).exists())


def prose(name, text):
    """Yield (line number, text) of comments, strings and names of functions, or of all lines of a page."""
    if not name.endswith(".py"):
        yield from enumerate(text.splitlines(), 1)
        return
    previous = ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        if kind in ("COMMENT", "STRING", "FSTRING_MIDDLE"):
            # Before Python 3.12 an f-string is one token, with its code in braces.
            yield from enumerate(re.sub(r"\{[^{}]*\}", "{}", token.string).splitlines(), token.start[0])
        elif kind == "NAME" and previous in ("def", "class"):
            yield token.start[0], token.string.replace("_", " ")
        previous = token.string


def misleading(name, text):
    """Return the findings in one file as "file:line: word; write ..." lines."""
    return [
        f"{name}:{number}: {match.group(0)!r}; write: {advice}"
        for number, line in prose(name, text)
        for pattern, advice in FORBIDDEN.items()
        if not any(name == file and part in line for file, part in ALLOWED)
        for match in pattern.finditer(line)
        if not (name in SURPRISING and match.group(0).startswith("know"))
    ]


def test_prose_reads_comments_strings_and_names_but_no_code():
    source = 'def made_anew():  # anew\n    """Whole shards."""\n    anew = f"mend {behind} it"\n'
    found = " | ".join(misleading("x.py", source))
    assert found.count("anew") == 2 and "'Whole shards'" in found and "'mend'" in found and "behind" not in found


@pytest.mark.parametrize("text", ["there is no cache", "it is no longer there", "what stands out", "the whole batch"])
def test_plain_english_is_accepted(text):
    assert misleading("page.md", text) == []


def test_no_misleading_words():
    names = [name for name in tracked() if not name.startswith(PENDING)]
    assert len(names) >= 10
    found = [line for name in names for line in misleading(name, (ROOT / name).read_text(encoding="utf-8"))]
    assert found == []
