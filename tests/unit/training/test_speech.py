"""Mouth shapes from timed phones, takes by seed, and speech sets on disk."""

import numpy as np
import pytest
from training.head import Head
from training.motion import EXPRESSIONS, MOTIONS, Manner, draw_manner, perform
from training.phones import (
    ARTICULATORS,
    FPS,
    PHONES,
    Phone,
    articulate,
    canonical,
    frame_phones,
    frame_times,
    mouth_coefficients,
    smooth_articulate,
)
from training.speech import SpeechSet, from_mu_law, mu_law, resample
from training.takes import SAMPLES_A_FRAME, make_take
from training.texts import sentence

WORD = [Phone("B", 0.4, 0.48), Phone("AA", 0.48, 0.68), Phone("B", 0.68, 0.76), Phone("UW", 0.76, 0.96)]


def track(phones, name, times):
    return articulate(phones, np.asarray(times))[:, ARTICULATORS.index(name)]


def test_lips_close_in_the_middle_of_a_bilabial_and_open_in_a_vowel():
    assert track(WORD, "close", [0.44, 0.72]).min() > 0.75
    assert track(WORD, "close", [0.58, 0.86]).max() < 0.15
    assert track(WORD, "jaw", [0.58]) > 2 * track(WORD, "jaw", [0.44])


def test_rounding_is_anticipated_and_jaw_rests_in_silence():
    rounding = track(WORD, "round", [0.50, 0.70, 0.86])
    assert rounding[0] < rounding[1] < rounding[2]
    assert rounding[1] > 0.1
    assert track(WORD, "jaw", [0.0, 0.1, 1.4]).max() < 0.01


def test_the_mouth_rests_between_phones_that_lie_apart():
    apart = [Phone("AA", 0.2, 0.4), Phone("AA", 0.9, 1.1), Phone("AA", 4.0, 4.2)]
    times = np.arange(0, 5, 0.04)
    jaw = track(apart, "jaw", times)
    assert np.isfinite(jaw).all()
    open_, between = track(apart, "jaw", [0.3]), track(apart, "jaw", [0.65, 2.5])
    assert (between < 0.2 * open_).all()


@pytest.mark.parametrize("name", PHONES)
def test_every_phone_has_a_shape_between_nothing_and_everything(name):
    values = articulate([Phone(name, 0.2, 0.4)], np.linspace(0, 0.6, 40))
    assert values.min() >= 0
    assert values.max() <= 1.1


def test_a_frame_shows_the_sound_of_the_row_before_it():
    assert frame_times(3) == pytest.approx([-0.02, 0.02, 0.06])
    labels = frame_phones([Phone("AA", 0.04, 0.12)], 6)
    assert [PHONES[label] for label in labels] == ["SIL", "SIL", "AA", "AA", "SIL", "SIL"]
    peak = int(smooth_articulate([Phone("AA", 0.98, 1.06)], 60)[:, 0].argmax())
    assert frame_times(60)[peak] == pytest.approx(1.02, abs=0.1 / FPS)


def test_names_of_phones():
    assert canonical("ah0") == "AH"
    assert canonical("pau") == "SIL"
    with pytest.raises(KeyError, match="QX"):
        canonical("QX")


def test_closed_lips_undo_the_jaw():
    names = Head("cpu").names
    shape = np.zeros((1, len(ARTICULATORS)))
    shape[0, ARTICULATORS.index("jaw")] = 0.4
    shape[0, ARTICULATORS.index("close")] = 1.0
    row = mouth_coefficients(shape, names)[0]
    assert row[names.index("mouthClose")] == pytest.approx(row[names.index("jawOpen")])
    smiling = mouth_coefficients(np.zeros((1, len(ARTICULATORS))), names, 1.0)[0]
    assert smiling[names.index("mouthSmileLeft")] > 0.5


def test_expression_and_motion_show_in_the_tracks():
    names = Head("cpu").names
    made = {}
    for expression in EXPRESSIONS:
        for motion in MOTIONS:
            manner = Manner(expression, motion, "")
            made[expression, motion] = perform(names, WORD, 75, manner, np.random.default_rng(3))
    smile = names.index("mouthSmileLeft")
    assert made["smiling", "still"]["coefficients"][30:, smile].min() > 0.15
    assert made["neutral", "still"]["coefficients"][-10:, smile].max() == 0
    portraits = [
        perform(names, WORD, 30, Manner("smiling", "still", ""), np.random.default_rng(seed))["coefficients"]
        for seed in range(20)
    ]
    assert 4 < sum(tracks[0, smile] > 0.4 for tracks in portraits) < 14
    spread = {motion: made["neutral", motion]["head"].std(0).sum() for motion in MOTIONS}
    assert spread["still"] < 0.3 * spread["moderate"] < 0.3 * spread["lively"]


def test_prompts_say_what_is_played():
    rng = np.random.default_rng(0)
    for _ in range(200):
        manner = draw_manner(rng)
        smiles = any(word in manner.prompt for word in ("smil", "cheerful"))
        assert smiles == (manner.expression == "smiling")
        assert manner.prompt


@pytest.fixture
def speech():
    rng = np.random.default_rng(0)
    parts = []
    for number in range(4):
        sound = rng.normal(0, 3000, 20000).astype(np.int16)
        parts.append((f"voice{number % 2}", sound, [Phone("SIL", 0, 0.2), *WORD, Phone("SIL", 0.96, 1.25)]))
    return SpeechSet.of(parts)


def test_takes_repeat_by_seed_and_fit_the_frames(speech):
    names = Head("cpu").names
    take, again = (make_take(speech, names, 51, 5) for _ in range(2))
    assert take.sound.shape == (50 * SAMPLES_A_FRAME,)
    assert np.array_equal(take.sound, again.sound)
    assert take.manner == again.manner
    for name, values in take.tracks.items():
        assert len(values) == 51
        assert np.array_equal(values, again.tracks[name])
    assert not np.array_equal(take.sound, make_take(speech, names, 51, 6).sound)


def test_takes_keep_sound_and_phones_together(speech):
    """Frames labelled as speech have sound, in every take with speech."""
    names = Head("cpu").names
    for seed in range(12):
        take = make_take(speech, names, 76, seed)
        if not take.phones.any():
            continue
        power = np.abs(take.sound.astype(float)).reshape(75, SAMPLES_A_FRAME).mean(1)
        assert power[take.phones[1:] > 0].mean() > 500
        assert take.phones[:3].max() == 0


def test_speech_sets_survive_the_disk(speech, tmp_path):
    speech.save(tmp_path / "a.npz")
    loaded = SpeechSet.load(tmp_path / "a.npz")
    sound, phones = loaded.utterance(2)
    original, spoken = speech.utterance(2)
    assert [phone.name for phone in phones] == [phone.name for phone in spoken]
    assert np.abs(sound.astype(int) - original).max() <= 0.03 * np.abs(original).max()
    mapped = SpeechSet.open(speech.keep(tmp_path / "b"))
    assert np.array_equal(mapped.samples, speech.samples)
    assert SpeechSet.join([speech, loaded]).seconds == pytest.approx(2 * speech.seconds)


def test_mu_law_is_fine_for_quiet_and_loud():
    values = np.array([-32000, -500, -10, 0, 10, 500, 32000], np.int16)
    assert from_mu_law(mu_law(values)) == pytest.approx(values, rel=0.04, abs=3)


def test_resampling_keeps_a_tone():
    tone = np.sin(2 * np.pi * 440 * np.arange(22050) / 22050)
    made = resample(tone, 22050)
    assert made == pytest.approx(np.sin(2 * np.pi * 440 * np.arange(16000) / 16000), abs=1e-3)


def test_sentences_are_many():
    rng = np.random.default_rng(0)
    made = {sentence(rng) for _ in range(300)}
    assert len(made) > 280
    assert not any(mark in text for text in made for mark in "{}_")
