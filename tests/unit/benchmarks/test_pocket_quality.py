"""The quality benchmark's numbers on tracks, faces and pictures whose answers are known."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import pocket_quality
from benchmarks.pocket import material, measures, quality, tradeoff
from benchmarks.pocket.generate import Job, Variant, overrides
from benchmarks.pocket.video_files import read_video, write_video
from training.head import Head
from training.looks import draw_looks
from training.motion import Manner
from training.phones import Phone, smooth_articulate
from training.speech import SAMPLE_RATE, SpeechSet
from training.studio import Studio
from training.takes import Take, make_take

from omniavatar.accel.attention.sparse_registry import choose_sparse
from omniavatar.config.load import load_config
from omniavatar.measure.quality import psnr

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "pocket.yaml"


def wave(frames=120, shift=0):
    time = np.arange(frames) - shift
    return 0.2 + 0.1 * np.sin(time / 3) + 0.1 * np.sin(time / 7.3)


def face(turn=0.0, size=1.0, seed=0):
    """Landmarks (478, 3) of a made-up face, its eyes level before it is turned in the picture's plane."""
    points = np.random.default_rng(seed).normal(0, 20, (478, 3))
    for corners, x in zip(measures.EYES, (-20, 20), strict=True):
        points[list(corners)] = (x, 0, 0)
    points[measures.INNER_LIPS[0]], points[measures.INNER_LIPS[1]] = (0, 30, 0), (0, 38, 0)
    matrix = np.array([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    return (points @ matrix * size + (96, 96, 0)).astype(np.float32)


def test_opening_is_the_gap_over_the_distance_of_the_eyes():
    marks = np.stack([face(), face(turn=0.4, size=1.5), np.full((478, 3), np.nan, np.float32)])
    opening = measures.opening(marks)
    assert opening[:2] == pytest.approx([0.2, 0.2], abs=1e-5) and np.isnan(opening[2])


def test_correlation_and_lag():
    assert measures.correlation(3 * wave() + 1, wave()) == pytest.approx(1)
    assert measures.best_lag(wave(shift=2), wave()) == 2
    assert measures.best_lag(wave(shift=-3), wave()) == -3
    gaps = wave()
    gaps[10:40] = np.nan
    assert measures.correlation(gaps, wave()) == pytest.approx(1)
    assert measures.correlation(np.full(120, np.nan), wave()) == 0
    assert measures.best_lag(np.full(120, np.nan), wave()) == measures.MAX_LAG + 1


def test_pauses_leave_out_their_borders_and_short_ones():
    speaking = np.array([0] * 8 + [1] * 10 + [0] * 5 + [1] * 3 + [0] * 9, bool)
    assert np.flatnonzero(measures.pauses(speaking)).tolist() == [2, 3, 4, 5, 28, 29, 30, 31, 32]
    read = np.where(speaking, 0.3, 0.03)
    assert measures.rest_ratio([read], [speaking]) == pytest.approx(0.1)
    assert np.isnan(measures.rest_ratio([np.full(35, np.nan)], [speaking]))


def test_faces_are_compared_whatever_their_pose():
    one, other = measures.face_shape(face()), measures.face_shape(face(turn=0.7, size=0.6))
    assert measures.shape_distance(one, other) == pytest.approx(0, abs=1e-3)
    assert measures.shape_distance(one, measures.face_shape(face(seed=1))) > 0.3
    several = np.stack([face(turn=turn) for turn in (0, 0.2, -0.3)])
    assert measures.shape_distance(measures.mean_shape(several), one) == pytest.approx(0, abs=1e-3)
    rows, columns = np.meshgrid(np.arange(192), np.arange(192), indexing="ij")
    smooth = np.stack([rows, columns, rows + columns], -1).astype(np.float32) / 2
    picture = smooth.astype(np.uint8)
    crop = measures.aligned_face(picture, face())
    assert crop.shape == (measures.FACE, measures.FACE, 3)
    left = measures.FACE // 2 - measures.EYE_GAP // 2
    assert crop[measures.EYE_ROW, left] == pytest.approx(smooth[96, 76], abs=2)
    assert measures.colour_distance(crop, crop + 3) == pytest.approx(3)


def test_sharpness_falls_with_blur_and_psnr_with_noise():
    sharp = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    soft = ((sharp[:, ::2, ::2].astype(int) + sharp[:, 1::2, 1::2]) // 2).astype(np.uint8)
    assert measures.sharpness(soft) < 0.8 * measures.sharpness(sharp)
    assert psnr(sharp, sharp) > 100
    flat = np.full((8, 8, 3), 100, np.uint8)
    assert psnr(flat, flat + 10) == pytest.approx(20 * np.log10(25.5))


def test_videos_survive_their_files(tmp_path):
    rows = np.linspace(0, 255, 192)[:, None, None] + np.zeros((192, 192, 3))
    frames = np.stack([np.roll(rows, 8 * number, 0) for number in range(5)]).astype(np.uint8)
    write_video(tmp_path / "a.mp4", frames)
    assert psnr(read_video(tmp_path / "a.mp4"), frames) > 35


def test_recordings_become_takes_in_time():
    samples = np.random.default_rng(0).normal(0, 1000, 9 * SAMPLE_RATE).astype(np.int16)
    phones = [Phone("AA", second, second + 0.5) for second in range(9)]
    speech = SpeechSet.of([("someone", samples, phones)])
    rng = np.random.default_rng(0)
    first, second = material._recorded_takes(speech, 0, Head("cpu").names, rng)
    for take, begin in ((first, 0.0), (second, 5 - 2 * material.LEAD)):
        assert len(take.sound) == (len(take.phones) - 1) * 640 and len(take.phones) <= material.FRAMES
        spoken = [frame for frame in range(len(take.phones)) if take.phones[frame]]
        middle = {(frame - 0.5) / 25 - material.LEAD + begin for frame in spoken}
        assert all(moment % 1 < 0.5 + 1e-6 for moment in middle), "phones are where their sound is"
        lead = int(material.LEAD * SAMPLE_RATE)
        start = int(begin * SAMPLE_RATE)
        assert np.abs(take.sound[lead : lead + 100] - samples[start : start + 100]).max() == 0


def test_expected_opening_follows_the_phones_alone():
    head = Head("cpu")
    phones = [Phone("B", 0.4, 0.5), Phone("AA", 0.5, 0.8), Phone("B", 0.8, 0.9)]
    shape = smooth_articulate(phones, 40).astype(np.float32)
    take = Take(
        np.zeros(39 * 640, np.int16),
        np.zeros(40, np.int64),
        shape,
        Manner("smiling", "still", ""),
        {},
        np.zeros((11, 10)),
    )
    expected = material.expected_opening(head, draw_looks(head, 1, 1).identity, take)
    assert expected[:5].max() < 0.02 < 0.1 < expected[17]
    assert expected.argmax() in range(14, 20)


def test_clip_is_written_with_its_truth(tmp_path):
    speech = SpeechSet.of([("tone", np.zeros(SAMPLE_RATE, np.int16), [Phone("AA", 0.1, 0.9)])])
    studio = Studio(iter(()), 0, torch.device("cpu"))
    take = make_take(speech, studio.head.names, 14, 20_001)
    written = material._write(tmp_path, studio, "one", "synthetic", "", take, 30_000)
    assert material.read_clips(tmp_path) == [written]
    assert (
        len(written.opening) == len(written.speaking) == len(read_video(tmp_path / "truth" / "one.mp4")) == 14
    )
    with pytest.raises(FileNotFoundError, match="generate"):
        quality.watch(tmp_path, "made/default", [written])
    with pytest.raises(FileNotFoundError, match="prepare"):
        material.read_clips(tmp_path / "nowhere")


def watched(kind, read, expected, number):
    clip = material.Clip(
        f"{kind}{number}", kind, "", "", tuple(expected), tuple(value > 0.25 for value in expected)
    )
    marks = np.repeat(face()[None], len(read), 0)
    marks[:, measures.INNER_LIPS[1], 1] = marks[:, measures.INNER_LIPS[0], 1] + 40 * read
    return quality.Watched(clip, np.zeros((len(read), 8, 8, 3), np.uint8), marks)


def test_table_tells_followers_from_strangers():
    rng = np.random.default_rng(0)
    tracks = [0.2 + 0.1 * np.convolve(rng.normal(size=140), np.ones(5) / 3, "valid")[:126] for _ in range(6)]
    good = [watched("synthetic", track, track, number) for number, track in enumerate(tracks)]
    result = quality.lip_sync(good)
    assert result["correlation"] > 0.999 and abs(result["floor"]) < 0.2 and result["lag_frames"] == 0
    others = [watched("recorded", tracks[number - 1], track, number) for number, track in enumerate(tracks)]
    assert abs(quality.lip_sync(others)["correlation"]) < 0.3
    made = {
        "lip_sync": {"all": result},
        "vae": {"psnr_mean_db": 33.0, "psnr_least_db": 30.0},
        "sharpness": 0.7,
    }
    made["identity"] = {"seconds": [1.0, 59.5], "drift": {"face_colour": 0.05}}
    text = quality.markdown(made, {"lip_sync": {"all": result}, "drift": {"face_colour": 0.01}})
    assert text.count("\n") >= 8 and "33.0" in text and "from 1 s to 60 s" in text


def row(name, seconds, correlation, sharpness=0.9):
    same = {
        "group": "steps",
        "forwards_a_window": 1.0,
        "rest_ratio": 0.1,
        "lag_frames": 0.0,
        "device": "here",
        "psnr_db": None,
    }
    found = {"seconds_a_second": seconds, "correlation": correlation, "sharpness": sharpness}
    return {"variant": name, **same, **found}


def test_front_and_recommendation():
    rows = [
        row("slow", 9, 0.90), row("middle", 4, 0.895), row("fast", 1, 0.70), row("worse", 5, 0.6),
        row("blurred", 0.5, 0.99, sharpness=0.3),
    ]  # fmt: skip
    assert tradeoff.pareto(rows) == ["fast", "middle", "slow"]
    assert tradeoff.recommended(rows) == "middle"
    text = tradeoff.markdown(rows)
    assert "Recommended: `middle`" in text and "drift" not in text
    drifting = [{**each, "drift": {"face_colour": 0.0625}} for each in rows]
    head, line, *cells = tradeoff.markdown(drifting).splitlines()
    assert head.endswith(" drift of the face colour |") and head.count("|") == line.count("|")
    assert all(each.endswith(" 0.062 |") for each in cells[: len(rows)])


def test_variants_are_compared_on_short_clips_or_on_those_of_a_minute(tmp_path):
    clips = [
        material.Clip(name, kind, "", "", (), ())
        for name, kind in (("a", "synthetic"), ("b", "recorded"), ("c", "recorded"), ("d", "long"))
    ]
    given = argparse.Namespace(minute=False, clips=2, work=tmp_path)
    assert [clip.name for clip in pocket_quality.compared_clips(clips, given)] == ["a", "b"]
    given.minute, given.clips = True, None
    assert [clip.name for clip in pocket_quality.compared_clips(clips, given)] == ["d"]
    with pytest.raises(SystemExit, match="no clips of a minute; run `prepare` with --long-clips"):
        pocket_quality.compared_clips(clips[:3], given)


def test_likeness_is_measured_against_the_exact_variant(tmp_path):
    rng = np.random.default_rng(0)
    exact = rng.integers(60, 200, (3, 32, 32, 1), np.uint8).repeat(3, 3).repeat(8, 1).repeat(8, 2)
    clip = material.Clip("one", "synthetic", "", "", (), ())
    for name, shift in (("exact", 0), ("near", 1), ("far", 20)):
        write_video(tmp_path / "made" / name / "one.mp4", exact + np.uint8(shift))
    near, far = (
        tradeoff.likeness(tmp_path, Variant(name, against="exact"), [clip]) for name in ("near", "far")
    )
    assert 40 < near < 50 and 20 < far < 24
    assert tradeoff.likeness(tmp_path, Variant("exact"), [clip]) is None


@pytest.mark.parametrize("variant", tradeoff.variants(), ids=lambda variant: variant.name)
def test_variants_are_valid_settings(variant, tmp_path):
    config = load_config(CONFIG, overrides(Job(CONFIG, tmp_path, variant, (), None))).config
    assert config.video.silence_duration_s == 0
    if variant.group == "sparse":
        sparse = config.sparsity
        name, block = sparse.sparse_backend, sparse.sparse_block_size
        chosen = choose_sparse(name, torch.device("cuda"), torch.float32, "cudnn", block, 64)
        assert chosen.takes(tradeoff.SPARSE_BLOCK)
    if variant.name.startswith("window_"):
        from omniavatar.sampling.windows import window_length

        assert window_length(config.video.max_tokens, 192, 192) == int(variant.name.removeprefix("window_"))
    if variant.calibrated:
        assert config.sampling.cache_policy != "none"


def test_names_of_variants_are_checked_and_results_are_json():
    names = [variant.name for variant in tradeoff.variants()]
    assert len(names) == len(set(names))
    for device, other in (("cpu", "cuda"), ("cuda", "cpu")):
        chosen = pocket_quality.chosen_variants(None, device)
        assert {variant.device for variant in chosen} == {"", device}
        assert {variant.against for variant in chosen} - {""} <= {variant.name for variant in chosen}
        assert pocket_quality.chosen_variants(["bf16"], other)[0].device == "cuda", "as named"
    assert pocket_quality.chosen_variants(["steps_8"], "cpu") == [
        Variant("steps_8", "steps", {"num_steps": 8})
    ]
    with pytest.raises(SystemExit, match="steps_9"):
        pocket_quality.chosen_variants(["steps_9"], "cpu")
    assert json.loads(json.dumps(pocket_quality.without_nan({"a": [float("nan"), 1.0]}))) == {
        "a": [None, 1.0]
    }


def test_a_command_gets_its_options(tmp_path: Path) -> None:
    """`measure` looks for its clips in the folder that the command names."""
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "work")):
        pocket_quality.main(["measure", "--work", str(tmp_path / "work")])
