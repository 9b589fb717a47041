"""One HTML page in one file: readable offline, on a phone, and in the dark; all text is escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from PIL import Image

from llava_twophase.text import printable

# A picture of at most this many pixels is a map of patches: stored exactly, and enlarged without smoothing.
_MAP_PIXELS = 64
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #5a6270; --line: #d5d9e0; --panel: #f5f6f8;
  --series: #0072b2; --marked: #c44e00; --warn: #7a3b00; --warn-paper: #fff1e0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #14171b; --soft: #a2abb8; --line: #343a43;
  --panel: #1d2127; --series: #56b4e9; --marked: #f0a35e; --warn: #ffd9ae; --warn-paper: #3a2714; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p { margin: .5rem 0; max-width: 60rem; } .soft, figcaption, caption { color: var(--soft); }
.warn { background: var(--warn-paper); color: var(--warn); border-left: .3rem solid; padding: .5rem .8rem; }
table { border-collapse: collapse; width: 100%; max-width: 60rem; margin: .5rem 0 1rem; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 400; color: var(--soft); width: 40%; } td { font-variant-numeric: tabular-nums; }
.plots, .cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; } figure img { width: 100%; } svg { width: 100%; height: auto; } figcaption { font-size: .9rem; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem; max-width: 60rem;
  white-space: pre-wrap; font-size: .85rem; } a { color: var(--series); }
.wrong { color: var(--marked); font-weight: 600; text-decoration: underline wavy; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem; }
.card h3 { font-size: .95rem; margin: .4rem 0 .2rem; } .card p { margin: .2rem 0; font-size: .9rem; }
.panels { display: flex; gap: .3rem; } .panels img { flex: 1; min-width: 0; width: 100%; aspect-ratio: 1;
  object-fit: contain; }
.map { image-rendering: pixelated; }
.ramp { display: inline-block; width: 6rem; height: .8rem; vertical-align: middle;
  background: linear-gradient(90deg, rgb(0 32 77), rgb(124 123 120), rgb(255 234 70)); }
input { font: inherit; width: 100%; max-width: 30rem; padding: .4rem .6rem; margin: .5rem 0 1rem; color: inherit;
  background: var(--panel); border: 1px solid var(--soft); border-radius: .4rem; }
summary { cursor: pointer; padding: .3rem 0; } [hidden] { display: none; }
"""
_SCRIPT = """
const box = document.querySelector('input'), cards = [...document.querySelectorAll('.card')];
if (box) { box.hidden = false; box.addEventListener('input', () => {
  const wanted = box.value.toLowerCase();
  for (const card of cards) card.hidden = !card.textContent.toLowerCase().includes(wanted);
}); }
"""
# The browser fetches nothing, whatever a key or a caption contains.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Markup(str):
    """Text that is HTML already, so it is not escaped again."""


@dataclass(frozen=True)
class Card:
    """Pictures of one image with texts below them.

    Attributes:
        title: Heading, such as the image key.
        lines: Paragraphs, such as captions; the filter of the page searches them and the title.
        note: Last paragraph, less prominent.
        panels: Descriptions and pictures, side by side.
    """

    title: str
    lines: Sequence[str]
    note: str = ""
    panels: Sequence[tuple[str, Image.Image]] = ()


@dataclass
class Page:
    """A page that is written from top to bottom.

    Attributes:
        title: Heading.
        lead: First paragraph.
        made_with: Program and version, for the last line.
    """

    title: str
    lead: str
    made_with: str
    _parts: list[str] = field(default_factory=list)

    def section(self, title: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{_escaped(title)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{_escaped(text)}</p>")

    def warn(self, text: str) -> None:
        """Add a highlighted paragraph."""
        self._parts.append(f'<p class="warn" role="note">{_escaped(text)}</p>')

    def code(self, lines: Sequence[str]) -> None:
        """Add commands; long lines are wrapped on the screen and stay one line when copied."""
        self._parts.append(f"<pre><code>{chr(10).join(map(_escaped, lines))}</code></pre>")

    def links(self, targets: Mapping[str, str]) -> None:
        """Add one line of links: label to relative address."""
        links = (f'<a href="{_escaped(target)}">{_escaped(label)}</a>' for label, target in targets.items())
        self._parts.append(f"<p>{' · '.join(links)}</p>")

    def table(self, rows: Mapping[str, str], title: str = "") -> None:
        """Add a table of names and values."""
        cells = (
            f'<tr><th scope="row">{_escaped(name)}</th><td>{_escaped(text)}</td></tr>' for name, text in rows.items()
        )
        caption = f"<caption>{_escaped(title)}</caption>" if title else ""
        self._parts.append(f"<table>{caption}{''.join(cells)}</table>")

    def grid(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Add a table of several columns."""
        head = "".join(f'<th scope="col">{_escaped(name)}</th>' for name in header)
        body = "".join(f"<tr>{''.join(f'<td>{_escaped(cell)}</td>' for cell in row)}</tr>" for row in rows)
        self._parts.append(f"<table><tr>{head}</tr>{body}</table>")

    def details(self, title: str, rows: Mapping[str, str]) -> None:
        """Add a table that opens when its title is clicked."""
        self._parts.append(f"<details><summary>{_escaped(title)}</summary>")
        self.table(rows)
        self._parts.append("</details>")

    def plots(self, drawn: Mapping[str, str]) -> None:
        """Add plots: title to SVG, as ``plots.inline_svg`` returns it."""
        figures = (
            f'<figure role="img" aria-label="plot: {_escaped(title)}">{svg}'
            f"<figcaption>{_escaped(title)}</figcaption></figure>"
            for title, svg in drawn.items()
        )
        self._parts.append(f'<div class="plots">{"".join(figures)}</div>')

    def figures(self, pictures: Mapping[str, Image.Image]) -> None:
        """Add pictures side by side, on a phone below each other: caption to picture."""
        figures = (
            f"<figure>{_image(picture, caption)}<figcaption>{_escaped(caption)}</figcaption></figure>"
            for caption, picture in pictures.items()
        )
        self._parts.append(f'<div class="plots">{"".join(figures)}</div>')

    def ramp(self, label: str, low: float, high: float) -> None:
        """Add a legend of the colours from dark blue to yellow, and the numbers at both ends."""
        text = f'{_escaped(label)}: {low:.4g} <span class="ramp"></span> {high:.4g}'
        self._parts.append(f'<p class="soft">{text}</p>')

    def cards(self, cards: Sequence[Card]) -> None:
        """Add cards, with a box that filters them by title and text."""
        self._parts.append('<input type="search" hidden placeholder="filter by key or caption" aria-label="filter">')
        self._parts.append('<div class="cards">')
        self._parts += map(_card, cards)
        self._parts.append("</div>")

    def to_bytes(self) -> bytes:
        """Return the page as UTF-8."""
        title = _escaped(self.title)
        text = (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><h1>{title}</h1><p>{_escaped(self.lead)}</p>\n"
            + "\n".join(self._parts)
            + f'\n<p class="soft">made with {_escaped(self.made_with)}</p><script>{_SCRIPT}</script></body></html>\n'
        )
        return text.encode("utf-8", "backslashreplace")


def mark_differences(written: str, true: str) -> Markup:
    """Return a written caption as HTML in which the words that the true caption does not have are marked."""
    words, expected = written.split(), true.split()
    parts = []
    for kind, _, _, start, end in SequenceMatcher(None, expected, words, autojunk=False).get_opcodes():
        text = _escaped(" ".join(words[start:end]))
        if text:
            parts.append(text if kind == "equal" else f'<span class="wrong">{text}</span>')
    return Markup(" ".join(parts))


def _card(card: Card) -> str:
    images = "".join(_image(picture, f"{text} of {card.title}") for text, picture in card.panels)
    panels = f'<div class="panels">{images}</div>' if images else ""
    lines = "".join(f"<p>{_escaped(line)}</p>" for line in card.lines)
    note = f'<p class="soft">{_escaped(card.note)}</p>' if card.note else ""
    return f'<article class="card">{panels}<h3>{_escaped(card.title)}</h3>{lines}{note}</article>'


def _image(picture: Image.Image, text: str) -> str:
    is_map = picture.width <= _MAP_PIXELS
    buffer = io.BytesIO()
    if is_map:
        picture.save(buffer, format="PNG")
    else:
        picture.convert("RGB").save(buffer, format="JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    kind, css = ("png", ' class="map"') if is_map else ("jpeg", "")
    return f'<img{css} loading="lazy" alt="{_escaped(text)}" src="data:image/{kind};base64,{data}">'


def _escaped(text: str) -> str:
    return text if isinstance(text, Markup) else html.escape(printable(text))
