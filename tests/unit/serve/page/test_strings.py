"""English texts of the page lie in one file, and the page uses each of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from omniavatar.serve import page
from web_pictures import PICTURED, page_digest

STATIC = Path(page.__file__).parent / "static"
STRINGS = (STATIC / "strings.js").read_text()
KEYS = set(re.findall(r'^\s*"?([\w:]+)"?: "', STRINGS, re.MULTILINE)) | set(
    re.findall(r', (other_\w+): "', STRINGS)
)
SCRIPTS = {path.name: path.read_text() for path in STATIC.glob("*.js") if path.name != "strings.js"}
HTML = (STATIC / "index.html").read_text()
BUILT = ("shape_", "intent_", "about_", "words_", "one_", "other_", "missing_")
"""Keys that a script puts together from such a beginning."""


def used() -> set[str]:
    quoted = {
        key
        for text in (*SCRIPTS.values(), STRINGS[STRINGS.index("export function") :])
        for key in re.findall(r'"([\w:]+)"', text)
    }
    return quoted | set(re.findall(r'data-t(?:-\w+)?="(\w+)"', HTML))


def test_every_text_of_the_page_has_a_string() -> None:
    asked = set(re.findall(r'data-t(?:-\w+)?="(\w+)"', HTML))
    asked |= {key for text in SCRIPTS.values() for key in re.findall(r'\bt\("(\w+)"', text)}
    assert len(asked) > 80 and asked <= KEYS, asked - KEYS


def test_no_string_is_unused() -> None:
    assert {key for key in KEYS - used() if not key.startswith(BUILT)} == set()


def test_the_html_has_no_words() -> None:
    body = HTML[HTML.index("<body>") : HTML.index("<noscript>")]
    words = re.sub(r"<[^>]*>", " ", body)
    assert re.findall(r"[A-Za-z]{2,}", words) == []


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_scripts_show_no_english_of_their_own(name: str) -> None:
    """What a script writes into the page comes from `t`."""
    texts = re.findall(r'(?:textContent|placeholder|title|alt) = ("[^"]*"|`[^`]*`)', SCRIPTS[name])
    assert [text for text in texts if re.search(r"[A-Za-z]{3,}", re.sub(r"\$\{[^}]*\}", "", text))] == []


def test_the_pictures_of_the_docs_show_todays_page() -> None:
    """If this fails, `python -m web_pictures docs/images` makes them again."""
    assert PICTURED.read_text().strip() == page_digest()


@pytest.mark.parametrize("path", sorted(STATIC.iterdir()), ids=lambda path: path.name)
def test_the_page_asks_no_other_server(path: Path) -> None:
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|//[a-z]+\.[a-z]|\beval\(|innerHTML|<script>|<style|\son\w+=", text)
    assert len(text.splitlines()) <= 400
