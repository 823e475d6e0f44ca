"""What reaches a terminal: no control sequence, no reversed text, no megabytes."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from command_line import run
from omniavatar.cli.progress import make_display
from omniavatar.cli.progress_batch import make_batch_display
from omniavatar.cli.terminal import SafeConsole
from omniavatar.engine.events import Message, RequestFinished, RequestStarted
from omniavatar.serve.batch.events import BatchStarted, ItemFailed, WorkerLost, WorkerReady
from omniavatar.text import MOST_LINE, cut, json_text, one_line, printable, quoted

HOSTILE = "a\x1b]0;owned\x07\x1b[31mb\x9b2J\u202ec\ud800\r\x7f"
SHOWN = "a\\x1b]0;owned\\x07\\x1b[31mb\\x9b2J\\u202ec\\ud800\\x0d\\x7f"


def is_harmless(text: str) -> bool:
    return all(letter in "\n\t" or (letter.isprintable() or letter == "\u3000") for letter in text)


def test_control_sequences_are_written_out() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("é 漢 😀\n\t") == "é 漢 😀\n\t"


@given(st.text(st.characters(categories=["Cc", "Cs", "Ll", "Lo", "Zs"])))
def test_any_text_becomes_one_harmless_line(text: str) -> None:
    line = one_line(text)
    assert "\n" not in line and printable(line) == line and "\x1b" not in line and "\x9b" not in line
    line.encode()


def test_a_long_line_keeps_its_remedy() -> None:
    line = one_line(f"file: {'x' * 10_000_000}; use another")
    assert len(line) <= MOST_LINE + 5 and line.startswith("file: xxx") and line.endswith("; use another")


def test_values_are_cut() -> None:
    assert cut("x" * 100, 10) == "xxxxxxx..." and cut("short") == "short"
    assert len(quoted("x" * 10**7)) <= 80 and len(quoted([1] * 10_000)) <= 80
    assert quoted(10**5000) == "a number of thousands of digits" and quoted("a'b") == '"a\'b"'


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252", None])
def test_json_lines_are_json_in_every_encoding(encoding: str | None) -> None:
    text = json_text({"text": f"{HOSTILE} é 漢"}, encoding=encoding)
    assert json.loads(text) == {"text": f"{HOSTILE} é 漢"} and printable(text) == text
    text.encode(encoding or "ascii")


@pytest.mark.parametrize(("log", "quiet"), [("rich", False), ("rich", True), ("json", False)])
def test_no_display_sends_a_control_sequence(log: str, quiet: bool) -> None:
    stream = io.StringIO()
    with make_display(log, quiet, stream) as display:  # type: ignore[arg-type]
        display(RequestStarted(0, HOSTILE, 5, windows=1, steps=2, resumed_windows=0))
        display(Message(HOSTILE, "warning"))
        display(RequestFinished(HOSTILE, 1.0, 5))
    written = stream.getvalue()
    assert "owned" in written and is_harmless(written), written


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_display_of_a_batch_sends_none_either() -> None:
    stream = io.StringIO()
    with make_batch_display("rich", False, stream) as display:
        display(BatchStarted(items=1, queued=1, skipped=0, failed=0))
        display(WorkerReady(worker=0, host=HOSTILE, device=HOSTILE, gpus=HOSTILE))
        display(ItemFailed(HOSTILE, line=2, error=HOSTILE, attempts=1))
        display(WorkerLost(worker=0, reason=HOSTILE))
    assert stream.getvalue().count("owned") == 3 and is_harmless(stream.getvalue())


def test_reports_send_none_either() -> None:
    for options in ([], ["--json"]):
        result = run("config", "show", "--hp=output_dir=a\u202eb\u009b", *options)
        assert result.exit_code == 0 and "\\u202e" in result.stdout and is_harmless(result.stdout)


def test_a_terminal_gets_our_colours_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    SafeConsole(stream).print(f"[red]a :smile:[/] {HOSTILE}")
    written = stream.getvalue()
    assert "\x1b[31ma :smile:" in written and "\\x1b]0;owned" in written
    assert "\x1b]" not in written and "\x1b[31mb" not in written and "\u202e" not in written
