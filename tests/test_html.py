"""The HTML page: text is escaped, tags are balanced, and nothing is fetched."""

import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from llava_twophase.html import Card, Page, mark_differences

HOSTILE = "</script><img src=x onerror=alert(1)>\x1b[31m & \"quoted\" 'text' \ud800"


class Balanced(HTMLParser):
    """Collects tags that are closed in another order than they were opened."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.problems = []
        self.links = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(tag)


def page_of_everything(text):
    """A page with each kind of content, all of it `text`."""
    page = Page(text, text, text)
    page.section(text)
    page.text(text)
    page.warn(text)
    page.code([text, text])
    page.links({text: "other.html"})
    page.table({text: text}, text)
    page.details(text, {text: text})
    page.figures({text: Image.new("RGB", (80, 60))})
    page.ramp(text, 0.5, 2)
    page.cards([Card(text, [text, mark_differences(text, "a")], text, [(text, Image.new("RGB", (4, 4), "red"))])])
    return page.to_bytes().decode("utf-8")


def test_page_escapes_all_text():
    text = page_of_everything(HOSTILE)
    assert text.count("<script>") == 1 and "<img src=x" not in text
    assert "\x1b" not in text and "\\x1b[31m" in text and "\\ud800" in text


def test_page_closes_its_tags_and_refers_to_data_only():
    parsed = Balanced(page_of_everything("plain"))
    assert (parsed.open, parsed.problems) == ([], [])
    assert parsed.links[0] == "other.html" and len(parsed.links) == 3
    assert all(link.startswith("data:image/") for link in parsed.links[1:])


def test_page_forbids_requests_and_fits_a_phone():
    text = page_of_everything("plain")
    assert "Content-Security-Policy\" content=\"default-src 'none';" in text
    assert 'name="viewport" content="width=device-width' in text


def test_page_stores_maps_exactly_and_pictures_as_jpeg():
    page = Page("t", "l", "m")
    page.figures({"map": Image.new("RGB", (24, 24)), "picture": Image.new("RGBA", (200, 100))})
    kinds = re.findall(r'<img( class="map")? [^>]*src="data:image/(\w+);', page.to_bytes().decode())
    assert kinds == [(' class="map"', "png"), ("", "jpeg")]


def test_card_without_pictures_or_note_has_no_empty_elements():
    page = Page("t", "l", "m")
    page.cards([Card("a.jpg", ["a caption"])])
    assert '<article class="card"><h3>a.jpg</h3><p>a caption</p></article>' in page.to_bytes().decode()


@pytest.mark.parametrize(
    ("written", "true", "marked"),
    [
        ("a <b> circle", "a red circle", 'a <span class="wrong">&lt;b&gt;</span> circle'),
        ("a red circle", "a red circle", "a red circle"),
        ("a", "a red circle", "a"),
        ("", "a", ""),
        ("x y", "", '<span class="wrong">x y</span>'),
    ],
)
def test_mark_differences_marks_words_that_the_true_caption_lacks(written, true, marked):
    assert mark_differences(written, true) == marked
