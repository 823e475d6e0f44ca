"""Training for live use: what it computes at once equals what the engine computes block after block."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training import nets as training_nets
from training.causal import block_causal, blocks_runner, roll_out, velocity
from training.drive import SIGNALS, read
from training.live_drive import SPAN, carried_noise
from training.scale import POCKET
from training.settings import read_live_settings
from training.stage_student import rolled
from training.stage_tiny import decode, fill_in, tiny_loss
from training.student_batch import cut, heard_live, robust_loss, seen_blocks, student_batch, window_of

from omniavatar.checkpoint.layout_files import TOKENIZER
from omniavatar.encoders.live_audio import LiveAudioEncoder
from omniavatar.engine.block_loop import CLEAN
from omniavatar.model.tiny_decoder import TinyDecoder, TinyDecoderConfig
from omniavatar.sampling.causal import CausalWindow
from omniavatar.sampling.noise import span_weights
from omniavatar.sampling.schedule import make_schedule

ROOT = Path(training_nets.__file__).parent
CHECK = ROOT / "configs" / "live_check.yaml"
SIDE = 4
TOKENS = 2 * (SIDE // 2) ** 2


@pytest.fixture(scope="module")
def nets():
    made = training_nets.Nets.fresh(0, ROOT / "assets" / TOKENIZER)
    made.audio.eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(made.dit.head.head.weight, std=0.05)
    return made


@pytest.fixture
def stories():
    torch.manual_seed(2)
    latents = 12
    return {
        "latents": torch.randn(2, 16, latents, SIDE, SIDE),
        "audio": torch.randn(2, 4 * latents - 3, POCKET.dit.audio_dim),
        "drive": torch.randn(2, latents, len(SIGNALS)),
        "eyes": torch.tensor([[[1.0, 1.0], [3.0, 1.0]]]).repeat(2, 1, 1),
    }


@pytest.mark.parametrize(("window", "sink"), [(6, 0), (6, 2), (12, 4)])
def test_all_blocks_at_once_see_what_the_engines_cache_holds(nets, stories, window, sink):
    sight, schedule = CausalWindow(2, window, sink), make_schedule(2, 5.0, (1000.0, 625.0))
    with torch.no_grad():
        text = nets.dit.prepare_text(torch.randn(2, 6, POCKET.text.dim))
        seen, noise = [], torch.randn_like(stories["latents"])
        hook = nets.dit.register_forward_hook(lambda _, inputs, made: seen.append((*inputs[:3], made)))
        made = roll_out(
            nets.dit, sight, schedule, stories["latents"][:, :, :1], text, stories["audio"],
            noise, torch.Generator().manual_seed(3), torch.float32,
        )  # fmt: skip
        hook.remove()
        padded = torch.cat([stories["audio"][:, :1].expand(-1, 3, -1), stories["audio"]], 1)
        for step, timestep in enumerate((1000.0, 625.0, CLEAN)):
            passes = seen[step::3]
            assert {float(each[2]) for each in passes} == {timestep}
            at_once = velocity(
                nets.dit,
                made,
                torch.cat([each[0] for each in passes], 2),
                stories["latents"][:, :, :1],
                torch.tensor([True, True]),
                torch.full((2,), timestep),
                text,
                padded,
                blocks_runner(nets.dit, block_causal(sight, TOKENS, 6), False),
            )
            torch.testing.assert_close(
                at_once, torch.cat([each[3] for each in passes], 2), atol=2e-5, rtol=1e-4
            )
    torch.testing.assert_close(made[:, :, :1], stories["latents"][:, :, :1])


def test_sound_is_heard_as_in_a_live_session(nets):
    sound = 0.1 * torch.randn(1, 40 * 640)
    with torch.no_grad():
        heard = heard_live(nets.audio, sound, 41, 2)
    ears = LiveAudioEncoder(Ears(nets.audio.wav2vec), 25)
    ears.push(sound[0].numpy())
    live = [ears.encode(frames) for frames in (4, 8, 8, 8, 8)]
    torch.testing.assert_close(heard[:, :36], torch.cat(live, 1), atol=2e-3, rtol=2e-3)


class Ears:
    """What `LiveAudioEncoder` needs of an `AudioEncoder`."""

    def __init__(self, model):
        self.model, self.width = model, POCKET.dit.audio_dim


@pytest.fixture
def pooled(stories):
    """Stories as they lie in the pool; the student's own blocks are all 5."""
    shape = stories["latents"].shape
    words = {"ids": torch.ones(2, 160, dtype=torch.long), "mask": torch.ones(2, 160, dtype=torch.long)}
    made = {"own": torch.full(shape, 5.0), "made": torch.ones(2), "weight": torch.zeros(2, *shape[2:])}
    return {**stories, **words, **made}


@pytest.fixture
def settings():
    return replace(read_live_settings(CHECK).student, run=6, begins=0.5)


def drawn(pooled, settings, seed=1):
    return cut(pooled, settings, torch.Generator().manual_seed(seed))


def test_a_run_is_a_part_of_the_story_with_its_sound(pooled, settings):
    starts = set()
    for seed in range(12):
        run = drawn(pooled, settings, seed)
        for row in range(2):
            parts = pooled["latents"][row].unfold(1, 6, 2).permute(1, 0, 4, 2, 3)
            (start,) = (2 * n for n, part in enumerate(parts) if torch.equal(part, run["latents"][row]))
            starts.add(start)
            assert run["first"][row] == (start == 0)
            sound = pooled["audio"][row, max(0, 4 * start - 3) : 4 * start + 21]
            torch.testing.assert_close(run["audio"][row, -len(sound) :], sound)
            torch.testing.assert_close(run["drive"][row], pooled["drive"][row, start : start + 6])
    assert starts == {0, 2, 4, 6}


@pytest.mark.parametrize("kind", ["own", "film", "lost", "mixed"])
def test_what_the_student_sees_of_the_past(pooled, settings, kind):
    shares = {f"{name}_share": float(name == kind) for name in ("own", "mixed", "lost")}
    settings = replace(settings, corrupt=0.0, **shares)
    run = drawn(pooled, settings)
    seen = seen_blocks(run, settings, torch.Generator().manual_seed(2))
    own, film = ((seen == other).all(1).all(-1).all(-1) for other in (5, run["latents"]))
    begun = run["first"]
    assert film[begun, 0].all()
    later = slice(1, None)
    assert (own[:, 2::2] == own[:, 3::2]).all()
    if kind == "own":
        assert own[:, later].all()
    elif kind == "film":
        assert film.all()
    elif kind == "lost":
        assert not own[:, later].any() and not film[:, later].any()
    else:
        assert (own | film).all() and own.any() and film[:, later].any()
    none_made = {**run, "made": torch.zeros(2)}
    assert not (seen_blocks(none_made, settings, torch.Generator().manual_seed(2)) == 5).all(1).any()


def test_only_pure_noise_carries_the_drive_and_the_film_is_always_what_follows(pooled, settings):
    settings = replace(settings, at_first=0.5, from_own=0.5)
    generator = torch.Generator().manual_seed(1)
    levels, from_own = set(), 0
    for seed in range(12):
        run = drawn(pooled, settings, seed)
        batch = student_batch(pooled, settings, generator.manual_seed(seed))
        level = (batch["timestep"] / 1000).view(-1, 1, 1, 1, 1)
        film = (batch["sample"] - level * batch["target"])[:, :, 1:]
        torch.testing.assert_close(film, run["latents"][:, :, 1:], atol=1e-5, rtol=1e-4)
        carried = (read(batch["sample"], pooled["eyes"]) - run["drive"])[:, 1:].abs().amax((1, 2)) < 1e-3
        assert (carried == (batch["timestep"] == 1000)).all()
        levels |= set(batch["timestep"].round().tolist())
        from_own += int((batch["sample"].mean((1, 2, 3, 4)) > 1.5).sum())
        assert (batch["weight"][:, :, 0] == 0).all()
        assert ((batch["weight"][:, 0, 1] > 0).all((1, 2)) == run["first"]).all()
    assert levels == set(settings.timesteps)
    assert from_own


def test_the_noise_changes_as_slowly_as_the_engines():
    drive = torch.zeros(4, 30, len(SIGNALS))
    eyes = torch.tensor([[[8.0, 9.0], [15.0, 9.0]]]).repeat(4, 1, 1)
    noise = carried_noise(drive, eyes, 24, 24, torch.Generator().manual_seed(0))[:, len(SIGNALS) :]
    weights = torch.from_numpy(span_weights(SPAN))
    for apart in range(1, SPAN + 2):
        shared = (weights[apart:] * weights[: max(0, SPAN - apart)]).sum()
        assert (noise[:, :, apart:] * noise[:, :, :-apart]).mean() == pytest.approx(float(shared), abs=0.01)
    assert noise.std() == pytest.approx(1, abs=0.01)


def test_roll_outs_begin_with_the_portrait_and_depend_on_the_seed_only(nets, pooled, settings):
    once, again, other = (
        rolled(nets, pooled, settings, steps, torch.Generator().manual_seed(3)) for steps in (1, 1, 2)
    )
    torch.testing.assert_close(once, again, atol=0, rtol=0)
    torch.testing.assert_close(once[:, :, :1], pooled["latents"][:, :, :1])
    assert (once[:, :, 1:] - pooled["latents"][:, :, 1:]).abs().mean() > 0.1
    assert not torch.equal(once, other)


def test_the_loss_counts_few_large_errors_less_than_many_small_ones():
    settings = replace(read_live_settings(CHECK).student, edges=0.0, steady=0.0, robust=0.2)
    weight = torch.ones(1, 1, 2, 8, 8)
    spread, single = torch.full((1, 16, 2, 8, 8), 0.1), torch.zeros(1, 16, 2, 8, 8)
    single[..., 0, 0] = 0.8
    assert single.square().mean() == pytest.approx(float(spread.square().mean()))
    assert robust_loss(single, weight, settings) < 0.5 * robust_loss(spread, weight, settings)
    assert robust_loss(spread / 10, weight, settings) == pytest.approx(0.0001, rel=0.02)
    uneven = spread * (1 - 2 * (torch.arange(8) % 2))
    whole = replace(settings, edges=1.0, steady=1.0)
    assert robust_loss(uneven, weight, whole) > robust_loss(spread, weight, whole)


def test_the_student_sees_whole_blocks_of_the_settings():
    settings = read_live_settings(ROOT / "configs" / "live.yaml").student
    assert window_of(settings).slots == 2
    assert (settings.frames + 3) // 4 % settings.block == 0 and settings.run % settings.block == 0


def test_the_small_decoder_trains_as_it_streams():
    tiny = TinyDecoder(TinyDecoderConfig((16, 8, 8, 8)))
    torch.manual_seed(0)
    fill_in(tiny)
    latents = torch.randn(2, 16, 6, 4, 4)
    with torch.no_grad():
        whole = decode(tiny, latents).clamp(-1, 1)[:, :, 3:]
        more = tiny.begin_clip()
        streamed = [torch.cat(list(more(part)), 2) for part in latents.split(2, 2)]
    torch.testing.assert_close(torch.cat(streamed, 2), whole, atol=1e-5, rtol=1e-5)


def test_the_small_decoder_learns_with_the_loss_against_flicker():
    """Its frames begin equal. Frames that differ at the start flicker, so that loss keeps pictures grey."""
    torch.manual_seed(0)
    tiny = TinyDecoder(TinyDecoderConfig((16, 8, 8, 8)))
    fill_in(tiny)
    latents = torch.randn(1, 16, 4, 4, 4)
    with torch.no_grad():
        last = decode(tiny, latents)[0, :, -4:]
    assert last.diff(dim=1).abs().mean() < 0.1 * last.std(), "memory makes a little difference"
    bright = (latents[:, :1].repeat_interleave(8, 3).repeat_interleave(8, 4) > 0).float() * 200 + 20
    frames = bright.expand(-1, 3, -1, -1, -1).repeat_interleave(4, 2)[:, :, 3:].transpose(1, 2)
    clips = {"latents": latents, "frames": frames.to(torch.uint8), "mouth": torch.full((1, 13, 2), 16.0)}
    clips["eyes"] = torch.full((1, 13, 2, 2), 9.0)
    settings = replace(read_live_settings(CHECK).tiny, clip=4, steady=2.0, corrupt=0.0)
    optimiser = torch.optim.Adam(tiny.parameters(), 0.003)
    generator, errors = torch.Generator().manual_seed(1), []
    for _ in range(40):
        loss, error = tiny_loss(tiny, clips, settings, generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.6 * errors[0]
