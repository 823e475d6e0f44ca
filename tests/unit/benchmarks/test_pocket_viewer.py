"""What a viewer sees, on made landmarks and pictures whose answers are known."""

import json
import shutil
import wave

import numpy as np
import pytest
from benchmarks.pocket import eyes, measures, quality, steadiness, viewer
from benchmarks.pocket.generate import Variant, generate
from benchmarks.pocket.material import Clip
from training.scale import OVERLAP, WINDOW

from omniavatar.assets import pocket
from omniavatar.config.load import load_config

SECOND = measures.FPS


def face(left=1.0, right=1.0, look=(0.0, 0.0)):
    """Landmarks (478, 3): eyes 24 pixels wide, their lids open by `left` and `right`."""
    points = np.random.default_rng(0).normal((96, 96, 0), 20, (478, 3))
    for corners, lids, iris, middle, gap, aside in zip(
        eyes.CORNERS, eyes.LIDS, eyes.IRISES, (70, 120), (right, left), look, strict=True
    ):
        points[list(corners)] = [(middle - 12, 80, 0), (middle + 12, 80, 0)]
        for upper, lower in lids:
            points[upper], points[lower] = (middle, 80 - 4 * gap, 0), (middle, 80 + 4 * gap, 0)
        points[list(iris)] = (middle + aside, 80, 0)
        points[list(iris[1:]), :2] += [(4, 0), (0, -4), (-4, 0), (0, 4)]
    return points.astype(np.float32)


def film_of(lids):
    """Landmarks of frames with both eyes open as given, after an open portrait."""
    return np.stack([face(), *(face(gap, gap) for gap in lids)])


def test_a_film_with_known_blinks_gives_their_number():
    blink, half, doze = [0.6, 0.1, 0.2, 0.8], [0.6, 0.55, 0.6, 0.8], [0.1] * 2 * SECOND
    lids = [1.0] * 20 + blink + [1.0] * 30 + half + [1.0] * 30 + blink + [1.0] * 10 + doze + [1.0] * 10
    found = eyes.blinks(eyes.lid_gaps(film_of(lids)))
    assert (found.count, found.complete, found.frames) == (3, 2, len(lids) + 1)
    assert found.a_minute == pytest.approx(3 * 60 * SECOND / (len(lids) + 1))
    none = eyes.blinks(eyes.lid_gaps(film_of([1.0, 0.8, 0.9] * 20)))
    assert (none.count, none.complete) == (0, 0)


@pytest.mark.parametrize(
    ("lids", "complete"),
    [
        ([0.26, 0.83, 0.81, 0.35, 0.36, 0.81, 1.06], 1),
        ([0.34, 0.59, 0.52, 0.27, 0.48, 0.81, 0.95], 1),
        ([0.90, 0.80, 0.59, 0.73, 0.82, 1.12], 0),
    ],
)
def test_a_blink_as_the_mesh_reads_it_in_films_is_one_blink(lids, complete):
    found = eyes.blinks(eyes.lid_gaps(film_of([1.0] * 10 + lids + [1.0] * 10)))
    assert (found.count, found.complete) == (1, complete)


def test_a_lost_face_is_no_blink():
    marks = film_of([1.0] * 40)
    marks[10:14] = np.nan
    found = eyes.blinks(eyes.lid_gaps(marks))
    assert (found.count, found.frames) == (0, 37)


def test_one_eye_shut_and_a_squint():
    marks = np.stack([face(), *[face(left=0.2)] * 3, *[face()] * 4, *[face(look=(0, 6))] * 4])
    gaps = eyes.lid_gaps(marks)
    assert eyes.blinks(gaps).count == 0, "a wink is no blink"
    assert eyes.apart_share(gaps) == pytest.approx(3 / 12)
    assert eyes.gaze_apart(marks, gaps) == pytest.approx(6 / 24, abs=1e-4)
    both = np.stack([face(), *[face(look=(5, 5))] * 5])
    assert eyes.gaze_apart(both, eyes.lid_gaps(both)) == pytest.approx(0, abs=1e-4)


def painted(colour):
    frame = np.full((192, 192, 3), 200, np.uint8)
    frame[70:90, 60:130] = colour
    return frame


def test_irises_keep_or_lose_their_colour():
    marks = film_of([1.0] * 60)
    blue, grey = painted((60, 90, 120)), painted((90, 90, 90))
    gaps = eyes.lid_gaps(marks)
    kept = eyes.iris_colours(np.stack([blue] * 61), marks, gaps)
    assert eyes.blue_minus_red(kept) == 60 and eyes.colour_loss(kept) == pytest.approx(0, abs=1e-6)
    lost = eyes.iris_colours(np.stack([blue] * 20 + [grey] * 41), marks, gaps)
    assert eyes.colour_loss(lost) == pytest.approx(1)
    shut = film_of([0.1] * 60)
    unseen = eyes.iris_colours(np.stack([blue] * 61), shut, eyes.lid_gaps(shut))
    assert np.isnan(unseen[1:]).all() and np.isnan(eyes.colour_loss(unseen))


@pytest.mark.parametrize(("config", "firsts"), [("pocket", [41, 77]), ("pocket-live", [*range(5, 113, 8)])])
def test_a_pulse_at_each_window_or_block_is_its_ratio(config, firsts):
    steps = np.full(WINDOW + 2 * (WINDOW - OVERLAP), 2.0)
    steps[firsts] = 6.0
    levels = (np.cumsum(steps * np.where(np.arange(len(steps)) % 2, 1, -1)) + 60).round().astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (len(steps), 8, 8, 3))
    assert steadiness.seam_frames(load_config(config).config, len(steps)) == firsts
    assert steadiness.seam_ratio(frames, firsts) == pytest.approx(3)
    assert np.isnan(steadiness.seam_ratio(frames[: firsts[0]], [])), "one window has no seam"


def test_flicker_is_read_only_where_the_film_stands_still():
    film = np.full((10, 64, 64, 3), 90, np.uint8)
    film[:, 30:34, 30:34] = np.arange(10, dtype=np.uint8)[:, None, None, None] * 20
    still = steadiness.background(film)
    assert still[0, 0] and not still[32, 32] and not still[32, 24] and still[32, 10]
    assert steadiness.flicker(film, still) == 0
    made = film.copy()
    made[::2] += 2
    assert steadiness.flicker(made, still) == pytest.approx(1, abs=1e-3)
    assert np.isnan(steadiness.flicker(film, np.zeros((64, 64), bool)))


def test_torn_frames_are_counted_against_the_film():
    marks = np.stack([face()] * 40)
    lips = list(steadiness.OUTER_LIPS)
    marks[:, lips, :2] = np.random.default_rng(1).uniform(80, 110, (len(lips), 2))
    film = np.full((40, 192, 192, 3), (150, 90, 90), np.uint8)
    film[:, 95:] = (140, 90, 90)
    made = film.copy()
    made[10:14, 90:100] = (90, 160, 90)
    edges = [steadiness.mouth_edges(frames, marks) for frames in (made, film)]
    assert steadiness.torn_share(*edges) == pytest.approx(4 / 40)
    jerky = marks.copy()
    jerky[20, lips[3], 0] += 15
    smooth = marks + np.arange(40)[:, None, None].astype(np.float32)
    jerks = [steadiness.lip_jerks(each) for each in (jerky, smooth)]
    assert jerks[1].max() == pytest.approx(0, abs=1e-5)
    assert steadiness.torn_share(jerks[0], jerks[1] + 0.01) == pytest.approx(3 / 40)


@pytest.mark.parametrize(
    ("prompt", "motion"),
    [
        ("A talking head, smiling, barely moving", "still"),
        ("Someone talks, with lively head movements", "lively"),
        ("A person is talking to the camera", "moderate"),
    ],
)
def test_prompts_name_their_motion(prompt, motion):
    assert viewer.motion_of(prompt) == motion


def test_warnings_are_counted(tmp_path):
    (tmp_path / "made").mkdir()
    clips = [Clip(name, "wordless", "", "", (), ()) for name in "ab"]
    notes = {"a": ["audio: only 3% of it is speech; the mouth"], "b": ["something else"]}
    for name, note in notes.items():
        (tmp_path / "made" / f"{name}.warnings").write_text(json.dumps(note))
    assert viewer.warned(tmp_path, "made", clips) == 0.5
    assert np.isnan(viewer.warned(tmp_path, "made", []))


def test_the_table_has_a_row_for_each_figure():
    lids = ([1.0] * 50 + [0.5, 0.1, 0.3]) * 3 + [1.0] * 5
    marks = film_of(lids)
    lips = list(steadiness.OUTER_LIPS)
    marks[:, lips, :2] = np.random.default_rng(1).uniform(80, 110, (len(lips), 2))
    frames = np.stack([painted((60, 90, 120))] * len(marks))
    frames[:, 40:60, 100] = 10
    short = Clip("one", "synthetic", "", "Someone talks, lively", (), ())
    watched = [quality.Watched(short, frames, marks)]
    result = viewer.look(watched, watched, None, steadiness.first_new_frames)
    assert result["blinks_a_minute"] == pytest.approx(3 * 60 * SECOND / len(marks), rel=0.01)
    assert result["blinks_complete"] == 1 and result["flicker"] < 1e-3 and result["lively_sharpness"] == 1
    assert np.isnan(result["seam_ratio"]) and np.isnan(result["still_sharpness"])
    text = viewer.markdown(result, result)
    assert text.count("\n") == len(viewer.FIGURES) - 1 and "| - | - |" in text


@pytest.mark.slow
def test_generate_keeps_the_warnings_of_a_clip_for_the_judge(tmp_path):
    """Noise instead of a voice, with the packaged model."""
    clip = Clip("noise", "wordless", "", "still", (), ())
    (tmp_path / "inputs").mkdir()
    shutil.copy(pocket.PORTRAIT, tmp_path / "inputs" / "noise.png")
    sound = np.random.default_rng(0).normal(0, 3000, 28 * 640).astype(np.int16)
    with wave.open(str(tmp_path / "inputs" / "noise.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(sound.tobytes())
    quick = Variant("quick", changes={"num_steps": 1, "max_tokens": 13 * 36})
    for _ in range(2):
        generate(pocket.CONFIG, tmp_path, [quick], [clip], 1)
        assert viewer.warned(tmp_path, "made/quick", [clip]) == 1, "also when the video is kept"
