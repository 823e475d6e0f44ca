"""What a window leaves for the next one: pixels, clean latents, or nothing before an anchor."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import head_pipeline, interrupt_in, make_pipeline, portrait, request, voice
from omniavatar import AvatarPipeline
from omniavatar.config.load import load_config
from omniavatar.engine.window_loop import WindowResult
from omniavatar.errors import ConfigError
from omniavatar.live.makers import maker_of
from omniavatar.sampling.windows import anchored, frames_encoded, plan_windows

SECONDS = 1.0
"""Four windows of 13 frames that share 5."""


def results(pipeline: AvatarPipeline, first: int = 0) -> list[WindowResult]:
    with pipeline.prepare(request(SECONDS)) as ready:
        return list(pipeline.windows(ready, first))


def frames(made: WindowResult) -> np.ndarray:
    return np.concatenate(made.frames)


@pytest.fixture(scope="module")
def clean(nano_checkpoint, cache) -> tuple[AvatarPipeline, list[WindowResult]]:
    made = make_pipeline(nano_checkpoint, cache, hand_over="clean", color_match=1, num_steps=1)
    return made, results(made)


def test_clean_latents_follow_one_frame_that_is_encoded_again(clean) -> None:
    """The frame is the model's own: the shown one has the portrait's colours."""
    pipeline, made = clean
    for before in made[:-1]:
        given = before.next_given
        assert given is not None and given.shape[2] == 2
        assert torch.equal(given[:, :, 1:], before.latent[:, :, -1:])
        pixels = torch.cat(list(pipeline.models.vae.decode_stream(before.latent)), dim=2)
        alone = pipeline.models.vae.encode(pixels[:, :, -5:-4].clamp(-1, 1))
        torch.testing.assert_close(given[:, :, :1], alone, rtol=0, atol=1e-5)
    assert made[-1].next_given is None


def test_a_window_begins_with_what_it_was_given(clean) -> None:
    _, made = clean
    for before, after in pairwise(made):
        assert before.next_given is not None
        assert torch.equal(after.latent[:, :, :2], before.next_given)


@pytest.fixture(scope="module")
def anchors(nano_checkpoint, cache) -> tuple[AvatarPipeline, list[WindowResult]]:
    made = make_pipeline(nano_checkpoint, cache, anchor_every=2, num_steps=1)
    return made, results(made)


def test_an_anchored_window_starts_from_the_portrait(anchors, nano_checkpoint, cache) -> None:
    """It needs nothing of the windows before it, and the video has the frames that it had."""
    pipeline, made = anchors
    plain = results(make_pipeline(nano_checkpoint, cache, num_steps=1))
    assert [each.window.first_new_frame for each in made] == [each.window.first_new_frame for each in plain]
    assert [len(frames(each)) for each in made] == [len(frames(each)) for each in plain]
    assert [each.window.anchored for each in made] == [False, False, True, False]
    assert [each.next_given is None for each in made] == [False, True, False, True]
    with pipeline.prepare(request(SECONDS)) as ready:
        reference = ready.conditioning.reference_latent
    assert torch.equal(made[2].latent[:, :, :1], reference)
    assert np.array_equal(frames(made[1]), frames(plain[1]))
    assert not np.array_equal(frames(made[2]), frames(plain[2]))
    alone = results(pipeline, first=2)
    assert [each.window.index for each in alone] == [2, 3]
    assert np.array_equal(frames(alone[0]), frames(made[2]))


def test_an_interrupted_run_goes_on_at_an_anchor(anchors, tmp_path) -> None:
    pipeline, _ = anchors

    interrupt_in(2, pipeline, request(SECONDS), tmp_path / "out.mp4")
    assert not list(tmp_path.rglob("given_00002.safetensors"))
    assert pipeline.generate(request(SECONDS), tmp_path / "out.mp4").resumed_windows == 2
    pipeline.generate(request(SECONDS), tmp_path / "whole.mp4")
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_live_chunks_hand_over_alike(heads_checkpoint, cache) -> None:
    """The second chunk starts from clean latents, the third one from the portrait."""
    pipeline = head_pipeline(heads_checkpoint, cache, anchor_every=2, hand_over="clean", num_steps=1)
    seconds = 28 / 25 * 3
    chunks = [chunk.frames for chunk in pipeline.stream(request(seconds, prompt=""))]
    maker, sound = maker_of(pipeline, portrait(), "", None), voice(seconds).samples
    for chunk in chunks:
        count = maker.missing
        maker.push(sound[:count])
        sound = sound[count:]
        assert np.array_equal(np.concatenate(list(maker.make(lambda: False))), chunk)


def test_frames_that_are_encoded_again() -> None:
    windows = anchored(plan_windows(40, 13, 5), 3)
    assert [each.index for each in windows if each.anchored] == [3]
    assert [frames_encoded(each, "pixels") for each in windows[1:]] == [5, 5, 0, 5]
    assert [frames_encoded(each, "clean") for each in windows[1:]] == [1, 1, 0, 1]
    assert frames_encoded(windows[1], "latents") == frames_encoded(None, "pixels") == 0
    assert anchored(windows[:1], 1) == windows[:1]


@pytest.mark.parametrize(
    ("config", "values", "text"),
    [
        ("pocket", ["hand_over=clean", "overlap_frame=1"], "no latent would be clean"),
        ("configs/leaptalk.yaml", ["hand_over=clean"], "taehv codes no frame alone"),
        ("configs/flashhead.yaml", ["hand_over=latents"], "hands over pixels or clean"),
        ("configs/livetalk.yaml", ["hand_over=clean"], "through its cache"),
        ("configs/livetalk.yaml", ["anchor_every=2"], "makes no windows"),
    ],
)
def test_what_cannot_be_handed_over_is_refused_in_one_line(config: str, values: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as error:
        load_config(config if config == "pocket" else Path(config), values)
    assert "\n" not in str(error.value) and values[0].partition("=")[0] in str(error.value)
