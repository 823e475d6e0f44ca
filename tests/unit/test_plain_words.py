"""The words of the package and of the documents: phrases that read badly are an error."""

from __future__ import annotations

import pytest

import plain_words
from plain_words import document_prose, findings, python_prose


def test_no_phrase_reads_badly() -> None:
    """`python tests/plain_words.py --room ROOM` lists them."""
    found = list(findings())
    assert not found, "\n".join(map(str, found))


def test_only_prose_is_read() -> None:
    source = '"""It was told.\n\nAnew, see."""\ntold = said("told")  # whoever\ntext = f"as ever {told}"\n'
    assert python_prose(source) == {
        1: "It was told.",
        2: "",
        3: "Anew, see.",
        4: "# whoever",
        5: "as ever ",
    }
    assert document_prose("a `told` b\n```\ntold\n```\nend") == {1: "a ` b", 5: "end"}


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("run it anew.", "anew"),
        ("Whoever starts it", "Whoever"),
        ("who is told so", "told"),
        ("a folder of its own", "of its own"),
        ("if it is there, use it", "is there"),
        ("it comes to 3 GB", "comes to"),
    ],
)
def test_phrases_are_found(text: str, phrase: str) -> None:
    path = plain_words.PACKAGE / "serve" / "x.py"
    (found,) = plain_words.in_lines(path, {7: text})
    assert (found.phrase, found.line, found.room) == (phrase, 7, "serve")
    assert str(found).startswith("src/omniavatar/serve/x.py:7: ")


def test_a_phrase_may_be_broken_over_two_lines() -> None:
    path = plain_words.PACKAGE / "x.py"
    (found,) = plain_words.in_lines(path, {3: "# a folder of its", 4: "# own, see"})
    assert (found.phrase, found.line, found.room) == ("of its own", 3, "package")
    assert not list(plain_words.in_lines(path, {3: "# a folder of its", 5: "# own, see"}))


def test_plain_words_are_left_alone() -> None:
    text = "there is a file; it is a renewed, foregone thing; retold and aforesaid; is there-fore"
    assert not list(plain_words.in_lines(plain_words.PACKAGE / "x.py", {1: text}))
