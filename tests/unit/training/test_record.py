"""Speech sets from voices and an aligner, the check of their fit, and settings that name several."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from training.phones import Phone
from training.record import fit, speak
from training.settings import read_settings
from training.speech import SAMPLE_RATE, SpeechSet

CHECK = Path(__file__).parents[3] / "training" / "configs" / "check.yaml"
SPOKEN = (
    ("SIL", 0.3, 2),
    ("P", 0.1, 5),
    ("AA", 0.3, 3000),
    ("M", 0.1, 900),
    ("T", 0.1, 20),
    ("IY", 0.3, 3000),
)
"""Phone, seconds, loudness."""


def say(text, rng):
    pieces = [rng.normal(0, loudness, round(seconds * SAMPLE_RATE)) for _, seconds, loudness in SPOKEN]
    return np.concatenate(pieces).astype(np.int16)


def hear(samples, text):
    """None for questions, as if they did not align."""
    assert len(samples) == pytest.approx(1.2 * SAMPLE_RATE, abs=5)
    ends = np.cumsum([seconds for _, seconds, _ in SPOKEN])
    phones = [Phone(name, end - seconds, end) for (name, seconds, _), end in zip(SPOKEN, ends, strict=True)]
    return None if text.endswith("?") else phones


def test_a_voice_speaks_until_the_time_is_full_without_what_does_not_align(capsys):
    speech = speak("somebody", say, 60, 4, hear)
    assert set(speech.voices) == {"somebody"}
    assert 60 <= speech.seconds < 61.2 + 0.1
    line = capsys.readouterr().out
    assert f"somebody: {len(speech)} sentences, 1.0 min" in line
    assert int(re.search(r"(\d+) left out", line)[1]) > 0
    again = speak("somebody", say, 60, 4, hear)
    assert np.array_equal(again.samples, speech.samples)
    assert not np.array_equal(speak("somebody", say, 60, 5, hear).samples, speech.samples)


def levels(line):
    share = float(re.match(r"([\d.]+)%", line)[1])
    return share, {
        names.strip(): float(level) for names, level in re.findall(r"([A-Z ]*[A-Z]) (-?[\d.]+) dB", line)
    }


def test_the_fit_shows_silence_and_closures_and_their_absence_where_phones_are_late():
    right = speak("somebody", say, 5, 4, hear)
    share, level = levels(fit(right))
    assert share == 100
    assert level["P B"] < level["T D K G"] < -35 < level["M"] < -5
    late = SpeechSet(
        right.samples, right.utterances, right.phones + np.float32([0, 0.25, 0.25]), right.voices
    )
    share, level = levels(fit(late))
    assert share < 60
    assert level["P B"] > -10


@pytest.mark.parametrize(
    ("given", "files"), [("", []), ("a.npz", ["a.npz"]), (["a.npz", "b.npz"], ["a.npz", "b.npz"]), ([], [])]
)
def test_settings_name_no_file_or_one_or_several(tmp_path, given, files):
    assert read_settings(changed(tmp_path, given)).speech.recorded_files == files


@pytest.mark.parametrize(
    "given", [3, None, ["a.npz", ""], ["a.npz", 2], ["a.npz", "a.npz"], [["a.npz"]], {"a": 1}]
)
def test_settings_refuse_what_is_no_list_of_files(tmp_path, given):
    with pytest.raises(ValueError, match=r"changed\.yaml: speech: recorded: .* neither a file nor a list"):
        read_settings(changed(tmp_path, given))


def changed(folder, recorded):
    table = yaml.safe_load(CHECK.read_text())
    table["speech"]["recorded"] = recorded
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(table))
    return path
