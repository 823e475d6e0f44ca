"""A block-causal video on tiny models: going on from the latents alone, graphs, endlessness, saved state."""

from __future__ import annotations

import resource
import statistics
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from omniavatar.accel.attention.registry import create_attention
from omniavatar.accel.decoder import TINY_PAST, VAE_PAST
from omniavatar.accel.graphs import FORWARDS_FIRST, GraphedBlocks
from omniavatar.accel.vae import FastVAEConfig, apply_fast_vae
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.vae import random_vae
from omniavatar.engine.block_video import BlockVideo
from omniavatar.engine.block_windows import BlockWindows
from omniavatar.engine.piece_decoder import PieceDecoder
from omniavatar.engine.recorder import NullRecorder
from omniavatar.engine.retry import retry_with_less
from omniavatar.engine.window_loop import WindowSampling
from omniavatar.errors import InputError, NumbersError
from omniavatar.model.dit import RunBlocks, WanDiT
from omniavatar.model.sizes import DiTConfig, VAEConfig
from omniavatar.model.tiny_decoder import TinyDecoder, TinyDecoderConfig
from omniavatar.sampling.causal import BlockHandOvers, CausalWindow
from omniavatar.sampling.schedule import make_schedule
from omniavatar.sampling.windows import KEPT, plan_blocks

CPU = torch.device("cpu")
LAYERS = 4
WINDOW = CausalWindow(block=2, window=8, sink=2)
SIZES = DiTConfig(48, 64, 2, LAYERS, text_dim=16, audio_dim=24, audio_hidden=8)


@pytest.fixture(scope="module")
def dit() -> WanDiT:
    _, attention = create_attention("sdpa", CPU, torch.float32)
    return random_dit(SIZES, attention=attention, dtype=torch.float32, device="cpu", seed=0)


def full() -> Any:
    vae = random_vae(VAEConfig(dim=8), dtype=torch.float32, device="cpu", seed=0)
    return apply_fast_vae(vae, FastVAEConfig("eager", paired_columns=False))


def small() -> Any:
    """Weights large enough that its memory shows in the last bits of its pictures."""
    torch.manual_seed(0)
    decoder = TinyDecoder(TinyDecoderConfig(widths=(8, 4, 4, 4))).requires_grad_(False)
    for weight in decoder.parameters():
        weight.mul_(1.5)
    return decoder


DECODERS = {"full": (full, VAE_PAST), "small": (small, TINY_PAST)}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def video(
    dit: WanDiT,
    decoder: Any = None,
    past: int = 0,
    window: CausalWindow = WINDOW,
    steps: int = 2,
    span: int = 1,
    **options: Any,
) -> BlockVideo:
    sampling = WindowSampling(3, make_schedule(steps, 5.0), (), "causal", window, noise_span=span)
    portrait = random(1, 16, 1, 2, 4, seed=1)
    text = random(1, 7, 16, seed=2)
    return BlockVideo(dit, decoder, text, portrait, sampling, 16, past, torch.float32, **options)


def audio(made: BlockVideo, block: int) -> Tensor:
    return random(1, made.frames_of(block), made.audio_width, seed=100 + block)


def make(made: BlockVideo) -> Tensor:
    return made.make(audio(made, made.done))


def gone_on(dit: WanDiT, latents: list[Tensor], done: int, **options: Any) -> BlockVideo:
    """A video that goes on after `done` blocks; only the blocks that the rule names are given."""
    made = video(dit, **options)
    files = BlockHandOvers(made.window, LAYERS, made.past_blocks).needed(done)
    made.go_on_after({number - 1: latents[number - 1] for number in files}, done, lambda b: audio(made, b))
    return made


@pytest.mark.parametrize(("name", "span"), [("full", 1), ("small", 1), ("small", 5)])
def test_a_video_goes_on_from_the_latents_of_few_blocks_to_the_bit(dit: WanDiT, name: str, span: int) -> None:
    """Cache and decoder are those of the uninterrupted video, though most of its blocks are not given."""
    create, past = DECODERS[name]
    decoder = create()
    whole, latents, frames = video(dit, decoder, past, span=span), [], []
    for _ in range(26):
        latents.append(make(whole))
        frames.append(np.concatenate(whole.frames(latents[-1])))
    for done in (1, 2, 5, 12, 23):
        resumed = gone_on(dit, latents, done, decoder=decoder, past=past, span=span)
        for block in range(done, min(done + 3, 26)):
            latent = make(resumed)
            assert torch.equal(latent, latents[block]), (done, block)
            assert np.array_equal(np.concatenate(resumed.frames(latent)), frames[block]), (done, block)


def test_the_blocks_that_are_seen_are_not_enough(dit: WanDiT) -> None:
    """Fewer replayed blocks leave another cache."""
    whole = video(dit)
    latents = [make(whole) for _ in range(13)]
    resumed = video(dit)
    for block in WINDOW.deciding(12, 1):
        resumed.generator.replay(audio(resumed, block), latents[block], block)
    assert not torch.equal(make(resumed), latents[12])


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_reaches_back_as_far_as_stated(name: str) -> None:
    create, past = DECODERS[name]
    decoder, latents = create(), random(1, 16, past + 4, 2, 2, seed=5).mul(3).split(1, dim=2)
    whole = PieceDecoder(decoder, 1)
    pixels = [torch.cat(list(whole(latent)), dim=2) for latent in latents]

    def after(count: int) -> bool:
        later = PieceDecoder(decoder, count)
        later.go_on_after(latents[-1 - count : -1])
        return torch.equal(torch.cat(list(later(latents[-1])), dim=2), pixels[-1])

    assert after(past)
    assert not after(past // 4)  # what is further back may fade below rounding


def test_a_block_that_was_decoded_in_part_is_decoded_again(dit: WanDiT) -> None:
    decoder = full()
    whole, stopped = (video(dit, decoder, VAE_PAST) for _ in range(2))
    for block in range(4):
        latent = make(whole)
        if block in (0, 2):
            next(stopped.decode(latent))
        expected = np.concatenate(whole.frames(latent))
        assert np.array_equal(np.concatenate(stopped.frames(latent)), expected), block


class Full:
    """A decoder and steps that find the memory full: in the third block; before steps 1 and 6."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.calls, self.steps = decoder, 0, 0

    def begin_clip(self) -> Any:
        decode = self.decoder.begin_clip()

        def more(latent: Tensor) -> Any:
            self.calls += 1
            for piece in decode(latent):
                if self.calls == 3:  # the decoder's state has gone on
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried")
                yield piece

        return more

    def stop(self) -> bool:
        """Called before every step."""
        self.steps += 1
        if self.steps in (1, 6):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return False


def test_a_block_is_made_again_after_a_failed_allocation(dit: WanDiT) -> None:
    windows = plan_blocks(28, WINDOW.block)
    rows = random(40, 24, seed=7).numpy()
    made = []
    for decoder in (full(), Full(full())):
        down: list[str] = []
        loop = BlockWindows(
            video(dit, decoder, VAE_PAST),
            rows,
            2,
            NullRecorder(),
            retry=lambda run, down=down: retry_with_less(run, down.append),
            stop=decoder.stop if isinstance(decoder, Full) else None,
        )
        made.append([(result.latent, np.concatenate(result.frames)) for result in loop.run(windows)])
    assert len(down) == 3
    for (latent, frames), (again, shown) in zip(*made, strict=True):
        assert torch.equal(latent, again) and np.array_equal(frames, shown)
    assert [len(frames) for _, frames in made[0]] == [5, 8, 8, 8]


class Capture:
    """Stands for a CUDA graph: a replay runs the captured work on the tensors that it saw."""

    def __init__(self) -> None:
        self.replayed = 0

    def release(self) -> None:
        raise AssertionError("nothing clears the captures of a running video")

    def __call__(self, work: Any) -> Any:
        out = torch.full_like(work(), float("nan"))

        def replay() -> None:
            self.replayed += 1
            out.copy_(work())

        return replay, out


def test_captured_passes_make_the_same_video(dit: WanDiT) -> None:
    """Rope, audio and time change from block to block; a captured pass sees those of its call."""
    capture = Capture()

    def wrap(run: RunBlocks) -> RunBlocks:
        return GraphedBlocks(run, capture)

    plain, graphed = video(dit), video(dit, wrap=wrap)
    blocks = 16
    for _ in range(blocks):
        assert torch.equal(make(plain), make(graphed))
    passes, slots = 3, WINDOW.rolling + 1
    assert capture.replayed == (blocks - WINDOW.slots + 1) * passes - slots * FORWARDS_FIRST > 0


@pytest.mark.parametrize("span", [1, 5])
def test_a_saved_state_goes_on_to_the_bit(dit: WanDiT, span: int) -> None:
    decoder = small()
    whole = video(dit, decoder, TINY_PAST, span=span)
    for _ in range(6):
        whole.frames(make(whole))
    state = whole.state()
    other = video(dit, decoder, TINY_PAST, span=span)
    other.restore(state)
    for _ in range(3):
        expected, latent = make(whole), make(other)
        assert torch.equal(expected, latent)
        assert np.array_equal(np.concatenate(whole.frames(expected)), np.concatenate(other.frames(latent)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"keys.0": None}, "keys.0"),
        ({"values.1": torch.zeros(1)}, "values.1"),
        ({"seed": torch.tensor(4)}, "seed"),
        ({"done": None}, "done"),
        ({"past": torch.zeros(1, 16, 2, 1, 1)}, "past"),
        ({"past": torch.zeros(3)}, "past"),
        ({"done": torch.tensor([1, 2])}, "done"),
        ({"noise_span": torch.tensor([5, 0])}, "noise_span"),
        ({"noise_span": torch.tensor([1, 1])}, "noise_span"),
        ({"noise_span": torch.tensor(5)}, "noise_span"),
        ({"keys.2": torch.full((1, 4 * 4, 2, 24), float("nan"))}, "keys.2"),
    ],
)
def test_a_state_of_another_video_is_refused(dit: WanDiT, change: dict[str, Any], named: str) -> None:
    made = video(dit, small(), TINY_PAST)
    made.frames(make(made))
    state = {name: value for name, value in (made.state() | change).items() if value is not None}
    other = video(dit, small(), TINY_PAST)
    with pytest.raises(InputError, match=f"state: .*{named}") as caught:
        other.restore(state)
    assert "\n" not in str(caught.value) and other.done == 0


def test_a_block_that_an_exception_left_is_made_again(dit: WanDiT) -> None:
    whole, stopped = video(dit), video(dit)
    for block in range(5):
        expected = make(whole)
        if block in (0, 3):

            def fail(step: int) -> None:
                if step == 1:
                    raise InterruptedError

            with pytest.raises(InterruptedError):
                stopped.make(audio(stopped, block), before_step=fail)
            assert stopped.done == block
        assert torch.equal(make(stopped), expected)


def test_numbers_that_are_not_finite_are_an_error(dit: WanDiT) -> None:
    made = video(dit, small(), TINY_PAST)
    with torch.inference_mode():
        latent = make(made) * float("inf")
    with pytest.raises(NumbersError, match="block 1: the latents"):
        made.frames(latent)


def test_positions_may_count_from_anywhere(dit: WanDiT) -> None:
    """Without a sink, a video of weeks goes on as one that has just begun."""
    window = CausalWindow(block=2, window=6, sink=0)
    early, late = video(dit, window=window), video(dit, window=window)
    far = 3 * 2_000_000
    for block in (3, 4, 5):
        latent = random(*early.generator.shape, seed=block)
        early.generator.replay(audio(early, block), latent, block)
        late.generator.replay(audio(early, block), latent, far + block)
    noise = random(*early.generator.shape, seed=9)
    made = [each.generator.make(audio(early, 6), lambda: noise.clone()) for each in (early, late)]
    torch.testing.assert_close(made[0], made[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_hour_of_video_takes_no_more_memory_or_time_a_block() -> None:
    """57,600 frames in blocks of 15 latents, decoded as they come."""
    _, attention = create_attention("sdpa", CPU, torch.float32)
    sizes = DiTConfig(12, 16, 2, 1, text_dim=8, audio_dim=0)
    tiny = random_dit(sizes, attention=attention, dtype=torch.float32, device="cpu", seed=0)
    decoder = TinyDecoder(TinyDecoderConfig(widths=(2, 2, 2, 2), latents_at_once=15)).requires_grad_(False)
    sampling = WindowSampling(0, make_schedule(1, 5.0), (), "causal", CausalWindow(15, 45, 15))
    text, portrait = random(1, 4, 8, seed=1), random(1, 16, 1, 2, 2, seed=2)
    made = BlockVideo(tiny, decoder, text, portrait, sampling, 16, TINY_PAST, torch.float32)
    frames, times, held = 0, [], []
    while frames < 3600 * 16:
        begun = time.process_time()
        shown = made.frames(made.make(None))
        times.append(time.process_time() - begun)
        frames += sum(map(len, shown))
        held.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert made.done == 961
    grown = (held[-1] - held[100]) * 1024
    assert grown < 8e6, f"{grown / 1e6:.1f} MB more after an hour"
    first, last = statistics.median(times[50:350]), statistics.median(times[-300:])
    assert last < 1.5 * first, (first, last)


def test_hand_overs_that_no_later_block_needs_go() -> None:
    rule = BlockHandOvers(CausalWindow(3, 15, 9), layers=30, decoded=13)
    held: set[int] = set()
    for done in range(1, 200):
        held.add(done)
        old = rule.outdated(done)
        held -= set() if old is None else {old}
        assert set(rule.needed(done)) <= held
        for earlier in range(max(1, done - KEPT), done):
            assert set(rule.needed(earlier)) <= held, "a damaged job can go back"
    assert len(held) == 3 + 30 + KEPT
