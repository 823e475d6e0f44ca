"""Training for live use: what it computes at once equals what the engine computes block after block."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training import nets as training_nets
from training.causal import block_causal, blocks_runner, roll_out, velocity
from training.drive import SIGNALS, read
from training.scale import POCKET
from training.settings import read_live_settings
from training.stage_student import heard_live, own_blocks, seen_blocks, student_batch, window_of
from training.stage_tiny import decode, fill_in

from omniavatar.checkpoint.layout_files import TOKENIZER
from omniavatar.encoders.live_audio import LiveAudioEncoder
from omniavatar.engine.block_loop import CLEAN
from omniavatar.model.tiny_decoder import TinyDecoder, TinyDecoderConfig
from omniavatar.sampling.causal import CausalWindow
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
        seen = []
        hook = nets.dit.register_forward_hook(lambda _, inputs, made: seen.append((*inputs[:3], made)))
        made = roll_out(
            nets.dit, sight, schedule, stories["latents"][:, :, :1], text, stories["audio"],
            stories["drive"], stories["eyes"], torch.Generator().manual_seed(3), torch.float32,
        )  # fmt: skip
        hook.remove()
        for step, timestep in enumerate((1000.0, 625.0, CLEAN)):
            passes = seen[step::3]
            assert {float(each[2]) for each in passes} == {timestep}
            at_once = velocity(
                nets.dit,
                made,
                torch.cat([each[0] for each in passes], 2),
                torch.full((2,), timestep),
                text,
                stories["audio"],
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


def test_finished_blocks_are_the_films_or_the_students_own_as_a_whole(pooled):
    settings = replace(read_live_settings(CHECK).student, corrupt=0.0)
    finished = seen_blocks(pooled, settings, torch.Generator().manual_seed(1))
    own = (finished == 5).all(1).all(-1).all(-1)
    assert not own[:, 0].any()
    assert (own[:, 2::2] == own[:, 3::2]).all()
    assert own.any()
    assert not own[:, 2:].all()
    true = ~own[:, None, :, None, None]
    torch.testing.assert_close(finished * true, pooled["latents"] * true)
    early = seen_blocks({**pooled, "made": torch.zeros(2)}, settings, torch.Generator().manual_seed(1))
    torch.testing.assert_close(early, pooled["latents"])


def test_examples_are_the_noisy_film_and_only_pure_noise_carries_the_drive(pooled):
    settings = replace(read_live_settings(CHECK).student, at_steps=1.0)
    generator = torch.Generator().manual_seed(1)
    levels = set()
    for _ in range(12):
        batch = student_batch(pooled, settings, generator)
        level = (batch["timestep"] / 1000).view(-1, 1, 1, 1, 1)
        film = batch["sample"] - level * batch["target"]
        torch.testing.assert_close(film[:, :, 1:], pooled["latents"][:, :, 1:], atol=1e-5, rtol=1e-4)
        noise = batch["target"] + pooled["latents"]
        carried = (read(noise, pooled["eyes"]) - pooled["drive"]).abs().amax((1, 2)) < 1e-3
        assert (carried == (batch["timestep"] == 1000)).all()
        levels |= set(batch["timestep"].round().tolist())
        assert (batch["weight"][:, :, 0] == 0).all()
    assert levels == set(settings.timesteps)


def test_own_blocks_begin_with_the_portrait_and_depend_on_the_seed_only(nets, pooled):
    settings = replace(read_live_settings(CHECK).student, timesteps=[1000], window=2)
    plain = blocks_runner(nets.dit, block_causal(window_of(settings), TOKENS, 6), False)
    at_once = own_blocks(nets, pooled, settings, torch.Generator().manual_seed(3), plain)
    again = own_blocks(nets, pooled, settings, torch.Generator().manual_seed(3), plain)
    torch.testing.assert_close(at_once, again, atol=0, rtol=0)
    torch.testing.assert_close(at_once[:, :, :1], pooled["latents"][:, :, :1])
    assert (at_once[:, :, 1:] - pooled["latents"][:, :, 1:]).abs().mean() > 0.1


def test_the_student_sees_whole_blocks_of_the_settings():
    settings = read_live_settings(ROOT / "configs" / "live.yaml").student
    assert window_of(settings).slots == 4
    assert (settings.frames + 3) // 4 % settings.block == 0


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
