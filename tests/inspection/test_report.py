"""``report``: one file that needs no other, and that a browser draws on a desktop, on a phone and in the dark."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from cache.make import FINGERPRINT, make_shard, rows, write
from inspection.command import inspect
from llava_twophase.cache.format import SHARDS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Tags(HTMLParser):
    """Every tag with its attributes, and whether tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.open = []
        self.problems = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(tag)


def report(made, folder, *flags):
    path = folder / "report.html"
    inspect("report", made.cache, "-o", path, *flags)
    return path


@pytest.fixture(scope="module")
def complete(original, tmp_path_factory):
    """A report with images and captions."""
    flags = ("--image_folder", original.images, "--data_path", original.records)
    return report(original, tmp_path_factory.mktemp("report"), *flags)


def test_report_needs_no_other_file(complete):
    pytest.importorskip("matplotlib")
    text = complete.read_text(encoding="utf-8")
    tags = Tags(text)
    assert tags.problems == [] and tags.open == []
    links = [value for _, attributes in tags.found for name, value in attributes.items() if name in ("src", "href")]
    links += re.findall(r"url\(([^)]*)\)", text)
    assert links and all(link.startswith(("data:image/", "#")) for link in links)
    assert 'xlink:href="http' not in text and "@import" not in text
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_report_shows_every_sampled_image_with_its_captions(complete, original):
    text = complete.read_text(encoding="utf-8")
    cards = re.findall(r'<article class="card">.*?</article>', text, flags=re.DOTALL)
    captions = {
        record["image"]: record["conversations"][1]["value"] for record in json.loads(original.records.read_text())
    }
    assert len(cards) == 12
    for key in original.keys:
        (card,) = [card for card in cards if f"<h3>{key}</h3>" in card]
        assert captions[key] in card and card.count("<img") == 3
        assert all(alt for alt in re.findall(r'alt="([^"]*)"', card))
        pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]*)", card)]
        assert [picture.size for picture in pictures] == [(224, 224), (4, 4), (4, 4)]


def test_plots_have_the_colours_of_the_page(complete):
    pytest.importorskip("matplotlib")
    plots = re.findall(r"<svg.*?</svg>", complete.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(plots) == 4
    assert all("currentColor" in plot and "#01020" not in plot for plot in plots)
    assert sum("var(--series)" in plot for plot in plots) == 3


def test_report_without_images_and_records(original, tmp_path):
    text = report(original, tmp_path, "--n", "3").read_text(encoding="utf-8")
    assert text.count('class="card"') == 3 and text.count("<img") == 6 and "Coverage" not in text


def test_report_escapes_text(tmp_path):
    cache = tmp_path / "cache"
    (cache / SHARDS).mkdir(parents=True)
    fingerprint = {**FINGERPRINT, "note": "</script><script>alert(1)</script>"}
    key = "<img src=x onerror=alert(1)>\x1b.jpg"
    write(cache, [make_shard(cache / SHARDS / "shard-000000.h5", [key, "b.jpg"], rows(2), fingerprint=fingerprint)],
          fingerprint=fingerprint)  # fmt: skip
    inspect("report", cache, "-o", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "&lt;img src=x onerror=alert(1)&gt;\\x1b.jpg" in text
    assert text.count("<script>") == 1 and "<img src=x" not in text and "\x1b" not in text


def test_report_with_a_missing_image_shows_the_others(made, tmp_path):
    (made.images / made.keys[0]).unlink()
    flags = ("--image_folder", made.images, "--data_path", made.records)
    text = report(made, tmp_path, *flags).read_text(encoding="utf-8")
    assert text.count('class="card"') == 12 and "the image: cannot be read" in text


def screenshot(page, path, size, dark=False):
    """The page as a browser without a network draws it: RGB array [height, width, 3]."""
    flags = ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={size}",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={path.parent / 'profile'}", *flags,
        f"--screenshot={path}", page.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed; on Debian: apt-get install chromium")
def test_browser_draws_the_report(complete, tmp_path):
    desktop = screenshot(complete, tmp_path / "desktop.png", "1200,4000")
    dark = screenshot(complete, tmp_path / "dark.png", "1200,4000", dark=True)
    phone = screenshot(complete, tmp_path / "phone.png", "390,4000")
    assert desktop[5, 5].min() > 240 and dark[5, 5].max() < 60
    # Something is drawn from edge to edge but nothing beyond: a page too wide for a phone would be scaled down.
    assert phone.shape[1] == 390 and (phone[:, 380:] < 128).mean() < 0.01
    # The drawn scenes' yellow, and the end of the ramp for norms.
    for picture in (desktop, dark):
        assert (np.abs(picture - (255, 234, 70)).sum(-1) < 12).sum() > 100
        assert np.abs(np.diff(picture.sum(-1), axis=1)).astype(bool).mean() > 0.01
