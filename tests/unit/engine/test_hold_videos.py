"""hold_background in whole videos: windows, blocks, chunks, resumed, continued and live ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from engine import causal_pipeline, head_pipeline, interrupt_in, make_pipeline, portrait, request, voice
from omniavatar import AvatarPipeline
from omniavatar.config.load import load_config
from omniavatar.engine.handover import load_shown
from omniavatar.engine.numbers import WindowNumbers
from omniavatar.engine.orders import WindowsOrder
from omniavatar.engine.window_loop import to_uint8
from omniavatar.engine.window_pixels import WindowPixels
from omniavatar.errors import ConfigError, ResumeError
from omniavatar.live.maker import BlockMaker
from omniavatar.live.makers import maker_of
from omniavatar.media.inspect import read_frames

LEVELS = 255
PROMPT = "a person speaks"
KINDS: dict[str, Callable[..., AvatarPipeline]] = {
    "windows": make_pipeline,
    "blocks": causal_pipeline,
    "chunks": head_pipeline,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(
    request: pytest.FixtureRequest, nano_checkpoint, heads_checkpoint, cache
) -> Callable[..., AvatarPipeline]:
    """Makes a pipeline of one kind."""
    checkpoint = heads_checkpoint if request.param == "chunks" else nano_checkpoint

    def make(**changes: object) -> AvatarPipeline:
        return KINDS[request.param](checkpoint, cache, num_steps=1, **changes)

    return make


@pytest.mark.parametrize("kind", ["windows", "blocks"], indirect=True)
def test_a_resumed_run_goes_on(kind, tmp_path: Path) -> None:
    """From the first frame and the weights beside the given latents."""
    pipeline = kind(hold_background=LEVELS)
    interrupt_in(2, pipeline, request(0.8), tmp_path / "out.mp4")
    (path,) = tmp_path.rglob("given_00002.safetensors")
    assert {"held", "held_at"} <= safetensors.torch.load_file(path).keys()
    assert pipeline.generate(request(0.8), tmp_path / "out.mp4").resumed_windows == 2
    pipeline.generate(request(0.8), tmp_path / "whole.mp4")
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def block(maker: BlockMaker) -> np.ndarray:
    maker.push(voice(4.0).samples[: maker.missing])
    return np.concatenate(list(maker.make(lambda: False)))


def test_live_pictures_are_held_alike(kind) -> None:
    """A restored session goes on with the first frame and the weights that were saved."""
    pipeline = kind(hold_background=LEVELS)
    maker = maker_of(pipeline, portrait(), PROMPT, 1)
    first, _ = block(maker), block(maker)
    state = {name: value.clone() for name, value in maker.state().items()}
    third = block(maker)
    other = {name: value * 0 if name.endswith("held") else value for name, value in state.items()}
    made = []
    for each in (state, other):
        resumed = maker_of(pipeline, portrait(), PROMPT, 1)
        resumed.restore(each)
        made.append(block(resumed))
    assert np.array_equal(made[0], third) and not np.array_equal(made[1], third)
    (reference,) = (value for name, value in state.items() if name.endswith("held_at"))
    assert reference.shape == (1, 3, 1, *maker.size) and len(first)


def damaged(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """States with one entry less, of another shape, or without numbers, by what is wrong."""
    for name, value in state.items():
        last = name.rpartition(".")[2]
        if last in ("noise_span", "past"):  # states of earlier versions lack them
            continue
        yield f"no {name}", {key: each for key, each in state.items() if key != name}
        if last in ("given", "rows", "held", "held_at", "heard"):
            yield f"another shape of {name}", {**state, name: value[..., 1:]}
        if last in ("given", "held"):
            yield f"no numbers in {name}", {**state, name: value * float("nan")}


def test_a_damaged_live_state_is_refused(kind) -> None:
    pipeline = kind(hold_background=LEVELS)
    maker = maker_of(pipeline, portrait(), PROMPT, 1)
    block(maker)
    wrong = dict(damaged(maker.state()))
    assert {"another shape", "no numbers"} <= {
        what.partition(" in ")[0].partition(" of ")[0] for what in wrong
    }
    resumed = maker_of(pipeline, portrait(), PROMPT, 1)
    for what, state in wrong.items():
        try:
            resumed.restore(state)
        except ResumeError:
            continue
        pytest.fail(f"a state with {what} was taken")


def test_a_live_state_before_an_anchored_window_has_nothing_given(nano_checkpoint, cache) -> None:
    changes = {"hold_background": LEVELS, "blend_frames": 2, "anchor_every": 2}
    pipeline = make_pipeline(nano_checkpoint, cache, num_steps=1, **changes)
    maker = maker_of(pipeline, portrait(), PROMPT, 1)
    block(maker), block(maker)
    state = {name: value.clone() for name, value in maker.state().items()}
    assert "given" not in state
    resumed = maker_of(pipeline, portrait(), PROMPT, 1)
    resumed.restore(state)
    assert np.array_equal(block(resumed), block(maker))


def test_what_is_handed_over_are_the_pictures_shown(nano_checkpoint, cache) -> None:
    pipeline = make_pipeline(nano_checkpoint, cache, num_steps=1, hold_background=LEVELS)
    with pipeline.prepare(request(0.8)) as ready:
        results = list(pipeline.windows(ready))
    frames = np.concatenate(results[0].frames)[-5:]
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
    with torch.inference_mode():
        given = pipeline.models.vae.encode(pixels)
    assert (results[0].next_given - given).abs().max() < 0.05
    assert results[-1].shown is None and results[0].shown is not None


def test_every_process_of_a_video_encodes_the_same_pictures(nano_checkpoint, cache) -> None:
    """With a shared VAE all of them decode, hold and encode; an order tells them what came before."""
    pipeline = make_pipeline(nano_checkpoint, cache, num_steps=1, hold_background=LEVELS, blend_frames=2)
    with pipeline.prepare(request(0.8)) as ready:
        results = list(pipeline.windows(ready))
        sampling, conditioning, windows = ready.window_sampling, ready.conditioning, ready.plan.windows
    order = WindowsOrder.of(
        sampling, conditioning, windows, 1, results[0].next_given, 1, False, results[0].shown
    )
    assert order.shown is results[0].shown
    left = []
    for leads in (True, False):
        pixels = WindowPixels(
            pipeline.models.vae,
            "pixels",
            0.0,
            sampling.blend_frames,
            sampling.hold_background,
            None,
            torch.device("cpu"),
            leads,
            to_uint8,
        )
        numbers = WindowNumbers("window 2 of 3", "", torch.device("cpu"))
        left.append(pixels.decode(results[1].latent.clone(), windows[1], 5, numbers, order.shown)[1:])
    (tail, shown), (other_tail, other_shown) = left
    assert torch.equal(tail, other_tail)
    for name, value in shown.tensors().items():
        assert torch.equal(value, other_shown.tensors()[name])
        assert torch.equal(value, results[1].shown.tensors()[name])
    assert len(shown.tensors()) == 3


def test_an_anchored_window_is_the_same_after_a_resume(nano_checkpoint, cache, tmp_path: Path) -> None:
    pipeline = make_pipeline(nano_checkpoint, cache, num_steps=1, hold_background=LEVELS, anchor_every=2)
    interrupt_in(2, pipeline, request(0.8), tmp_path / "out.mp4")
    assert pipeline.generate(request(0.8), tmp_path / "out.mp4").resumed_windows == 2
    pipeline.generate(request(0.8), tmp_path / "whole.mp4")
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


@pytest.mark.parametrize("blend", [0, 2])  # the packaged model has both
def test_a_continued_video_is_held_at_its_last_frame(
    nano_checkpoint, cache, tmp_path: Path, blend: int
) -> None:
    changes = {"hold_background": LEVELS, "blend_frames": blend}
    pipeline = make_pipeline(nano_checkpoint, cache, num_steps=1, crf=0, **changes)
    begun = pipeline.generate(request(0.4), tmp_path / "begun.mp4")
    more = request(audio=voice(0.6, seed=7), continues=begun.output)
    interrupt_in(2, pipeline, more, tmp_path / "out.mp4")
    left = [load_shown(path, (64, 64), bool(blend), True) for path in sorted(tmp_path.rglob("given_*"))]
    last = list(read_frames(begun.output))[-1]
    for each in left:
        assert each.reference is not None
        assert np.array_equal(each.reference[0, :, 0].permute(1, 2, 0).numpy(), last)
    pipeline.generate(more, tmp_path / "out.mp4")
    pipeline.generate(more, tmp_path / "whole.mp4")
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


@pytest.mark.parametrize(
    ("left", "named"),
    [
        ({}, "no first frame of 64x32 pixels"),
        ({"held_at": torch.zeros(1, 3, 1, 64, 32, dtype=torch.uint8)}, "no first frame of 64x32 pixels"),
        ({"held": torch.ones(1, 1, 9, 9)}, "no weights of the background of 64x32 pixels"),
        ({"held": torch.full((1, 1, 24, 48), float("nan"))}, "no weights"),
        ({"held": torch.full((1, 1, 24, 48), 2.0)}, "no weights"),
    ],
)
def test_a_hand_over_without_its_pictures_is_refused(left: dict, named: str, tmp_path: Path) -> None:
    path = tmp_path / "given_00001.safetensors"
    whole = {"held_at": torch.zeros(1, 3, 1, 32, 64, dtype=torch.uint8), "held": torch.ones(1, 1, 24, 48)}
    safetensors.torch.save_file({"given": torch.zeros(1), **(whole if left else {}), **left}, path)
    with pytest.raises(ResumeError, match=f"{named}.*; use --no-resume"):
        load_shown(path, (32, 64), False, True)
    assert load_shown(path, (32, 64), False, False) is not None


def test_a_live_state_of_another_size_is_refused(nano_checkpoint, cache) -> None:
    pipeline = causal_pipeline(nano_checkpoint, cache, num_steps=1, hold_background=LEVELS)
    maker = maker_of(pipeline, portrait(), PROMPT, 1)
    block(maker)
    state = {**maker.state(), "video.held": torch.ones(1, 1, 3, 3)}
    with pytest.raises(ResumeError, match="no weights of the background of 64x64 pixels"):
        maker_of(pipeline, portrait(), PROMPT, 1).restore(state)


@pytest.mark.parametrize("value", ["-1", "256", "yes", "nan"])
def test_levels_out_of_range_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="hold_background"):
        load_config(Path("configs/pocket.yaml"), [f"hold_background={value}"])
