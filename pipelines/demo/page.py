"""The demo's result as one HTML file, pictures and all, that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from difflib import SequenceMatcher
from html import escape
from pathlib import Path

from PIL import Image

from pipelines.demo.evaluate import Evaluation

THUMBNAIL = 128  # pixels

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --good: #3fb950; --bad: #ff7b72; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { text-align: left; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); }
td.number { font-variant-numeric: tabular-nums; font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .7rem; border: 1px solid var(--line); border-radius: .5rem; }
figure img { width: 128px; height: 128px; object-fit: contain; display: block; margin-bottom: .4rem; }
figcaption { font-size: .9rem; }
figcaption b { font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); }
.wide { max-width: 100%; }
del { text-decoration: none; color: var(--bad); font-weight: 600; }
"""


def write_page(path: Path, title: str, notes: list[str], result: Evaluation, images: Path, shown: Path) -> None:
    """Write the page.

    Args:
        path: HTML file to write.
        title: Heading.
        notes: Paragraphs that say what was run, and on what.
        result: Figures and captions of the held-out records.
        images: Folder that their image keys are relative to.
        shown: The picture that `inspect_cache.py show` made.
    """
    figures = [
        ("loss with the right image", f"{result.right_image_loss:.3f}"),
        ("loss with a wrong image", f"{result.wrong_image_loss:.3f}"),
        ("generated captions that are exactly the true one", f"{result.exact_captions:.0%}"),
    ]
    rows = "".join(f'<tr><td>{escape(name)}</td><td class="number">{value}</td></tr>' for name, value in figures)
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in notes)
    pairs = zip(result.records, result.generated, strict=True)
    cards = "\n".join(_card(images / record.image, record.caption, text) for record, text in pairs)
    path.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
{paragraphs}
<table><tr><th>on {len(result.records)} held-out pictures</th><th></th></tr>{rows}</table>
<p>One picture, its patch features as PCA colours, and their norms (<code>inspect_cache.py show</code>):</p>
<img class="wide" alt="picture, PCA colours and norms of its patch features" src="{_embed(shown.read_bytes())}">
<h2>Held-out pictures</h2>
<p>Written by the model, with the words that are not in the true caption marked.</p>
<div class="cards">
{cards}
</div></body></html>
""",
        encoding="utf-8",
    )


def _card(image: Path, caption: str, generated: str) -> str:
    with Image.open(image) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    packed = io.BytesIO()
    picture.save(packed, "PNG", optimize=True)
    if caption == generated:
        text = f'<b class="good">✓ exact</b><br>{escape(caption)}'
    else:
        text = f'<b class="bad">✗</b> {marked(caption, generated)}<br>true: {escape(caption)}'
    thumbnail = f'<img alt="{escape(caption)}" src="{_embed(packed.getvalue())}">'
    return f"<figure>{thumbnail}<figcaption>{text}</figcaption></figure>"


def marked(caption: str, generated: str) -> str:
    """Return the generated caption as HTML, words that do not match the true caption in `<del>`."""
    true, words = caption.split(), generated.split()
    parts = []
    for kind, _, _, start, end in SequenceMatcher(None, true, words, autojunk=False).get_opcodes():
        text = escape(" ".join(words[start:end]))
        if text:
            parts.append(text if kind == "equal" else f"<del>{text}</del>")
    return " ".join(parts)


def _embed(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
