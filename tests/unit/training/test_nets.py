"""Training: forwards equal those of the engine, batches match its inputs, and losses fall."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training import nets as training_nets
from training.augment import roughen
from training.drive import SIDEWAYS, SIGNALS, read
from training.export import export, load_files
from training.loop import Budget, Optimiser, Pool
from training.ranks import TrainingRanks
from training.scale import LATENTS, POCKET, WINDOW
from training.session import Session, check_order, parse_stages
from training.settings import read_settings
from training.stage_audio import audio_loss
from training.stage_dit import Story, disturb, dit_batch, dit_loss, draw_levels, mirrored, window_audio
from training.stage_vae import blend, fidelity, learners, texture, vae_loss
from training.studio import Film

from omniavatar.checkpoint.layout_files import TOKENIZER
from omniavatar.encoders.audio import AudioEncoder
from omniavatar.encoders.text import TextEncoder
from omniavatar.engine.window_inputs import audio_slice
from omniavatar.model.vae import normalise
from omniavatar.sampling.schedule import make_schedule
from omniavatar.types import Window
from ranks import RankPool

ROOT = Path(training_nets.__file__).parent
CHECK = ROOT / "configs" / "check.yaml"


@pytest.fixture(scope="module")
def nets():
    return training_nets.Nets.fresh(0, ROOT / "assets" / TOKENIZER)


@pytest.fixture(scope="module")
def settings():
    return read_settings(CHECK)


def test_exported_files_load_in_the_engine_and_agree(nets, tmp_path):
    torch.manual_seed(0)
    size = export(nets, tmp_path)
    assert size < 32 * 2**20
    sound = torch.randn(40 * 640) * 0.1
    encoder = AudioEncoder.load(tmp_path / "wav2vec", "cpu")
    heard = encoder.encode(sound.numpy(), 40, 25, tmp_path / "features.npy")
    rounded = copy.deepcopy(nets.audio)
    rounded.load_state_dict(
        {name: value.bfloat16().float() for name, value in nets.audio.state_dict().items()}
    )
    with torch.no_grad():
        wanted = rounded.eval().features(training_nets.normalise_sound(sound[None]), 40)[0]
    assert heard.shape == (40, POCKET.dit.audio_dim)
    np.testing.assert_allclose(heard, wanted.numpy(), atol=2e-4)
    prompt = "A talking head, smiling"
    text = TextEncoder.load(
        tmp_path / "text_encoder.safetensors", tmp_path / TOKENIZER, "cpu", torch.float32
    ).encode([prompt])
    with torch.no_grad():
        trained = nets.text(*nets.text.tokens([prompt]))
    assert text.shape == trained.shape
    torch.testing.assert_close(text, trained, atol=0.05, rtol=0.05)


def test_latent_statistics_fold_in_without_changing_the_pictures(nets):
    vae = copy.deepcopy(nets.vae)
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        mean, _ = training_nets.vae_encode(vae, video)
        before = training_nets.vae_decode(vae, mean)
        axes = (0, 2, 3, 4)
        training_nets.set_latent_statistics(vae, mean.mean(axes), mean.std(axes))
        latents = training_nets.normalised_latents(vae, video)
        after = training_nets.pixels_of(vae, latents)
    torch.testing.assert_close(latents.mean(axes), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(axes), torch.ones(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
    torch.testing.assert_close(normalise(training_nets.vae_encode(vae, video)[0]), vae.encode(video))


def test_a_new_vae_codes_frame_by_frame(nets):
    """A clip of equal frames decodes to equal pictures, so training can start with single frames."""
    still = torch.rand(1, 3, 1, 32, 32).expand(-1, -1, 9, -1, -1) * 2 - 1
    with torch.no_grad():
        latent = training_nets.vae_encode(nets.vae, still)[0]
        made = training_nets.vae_decode(nets.vae, latent)
    torch.testing.assert_close(latent, latent[:, :, :1].expand_as(latent), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made, made[:, :, :1].expand_as(made), atol=1e-4, rtol=1e-4)
    assert made.std() > 0.1


def test_memory_format_changes_nothing(nets):
    vae = copy.deepcopy(nets.vae)
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        before = training_nets.normalised_latents(vae, video)
        training_nets.channels_last(vae)
        torch.testing.assert_close(training_nets.normalised_latents(vae, video), before, atol=1e-4, rtol=1e-4)


def test_state_files_are_small_and_come_back(nets, tmp_path):
    training_nets.save_state(nets, {"sessions": 3}, tmp_path)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert max(sizes) < 16 * 2**20
    other = training_nets.Nets.fresh(1, ROOT / "assets" / TOKENIZER)
    assert training_nets.load_state(other, tmp_path) == {"sessions": 3}
    name = "blocks.3.ffn.0.weight"
    assert torch.equal(other.dit.state_dict()[name], nets.dit.state_dict()[name].half().float())


def test_windows_hear_what_the_engine_gives_them():
    audio = torch.randn(1, 80, 6)
    for start, given in ((0, 1), (36, 5)):
        window = Window(
            index=start, start=start, length=WINDOW, given_frames=given, new_frames=WINDOW - given
        )
        wanted = audio_slice(audio[0].numpy(), window)
        torch.testing.assert_close(window_audio(audio, torch.tensor([start])), wanted)


def stories(count=2, cells=4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    ids = torch.zeros(count, 160, dtype=torch.int64)
    ids[:, :3] = 5
    return {
        "latents": normal(count, 2, 16, LATENTS, cells, cells).half(),
        "weight": torch.rand(count, 2, LATENTS, cells, cells, generator=generator).half(),
        "starts": torch.tensor([[0, 8]] * count),
        "drive": normal(count, 2, LATENTS, len(SIGNALS)),
        "eyes": torch.tensor([[1.0, 1.5], [3.0, 1.5]]).expand(count, -1, -1),
        "audio": normal(count, 52, POCKET.dit.audio_dim).half(),
        "ids": ids,
        "mask": (ids > 0).long(),
    }


def test_a_batch_shows_given_latents_and_counts_the_others(settings):
    pool = stories(64)
    batch = dit_batch(pool, settings.dit, torch.Generator().manual_seed(1))
    mask = batch["y"][:, 16:]
    known = mask == 0
    given = known[:, 0, :, 0, 0].sum(1)
    assert set(given.tolist()) <= {1, 2, 3, 4}
    assert ((batch["weight"] == 0) == known.expand_as(batch["weight"])).all()
    assert batch["weight"].mean() == pytest.approx(1, abs=1e-5)
    portraits = pool["latents"][:, 0, :, :1].float()
    torch.testing.assert_close(batch["y"][:, :16], portraits.expand(-1, -1, LATENTS, -1, -1))
    first = (batch["sample"][:, :, 0] == portraits[:, :, 0]).flatten(1).all(1)
    assert (given[first] == 1).all()
    assert 10 < first.sum() < 54
    silent = (batch["audio"] == 0).flatten(1).all(1)
    assert 0 < silent.sum() < 20
    sigma = (batch["timestep"] / 1000).view(-1, 1, 1, 1, 1)
    clean = batch["sample"] - sigma * batch["target"]
    again = clean + batch["target"]
    rest = ~known.expand_as(batch["sample"])
    noise = batch["sample"] + (1 - sigma) * batch["target"]
    torch.testing.assert_close(again[rest], noise[rest])
    assert noise[rest].std() == pytest.approx(1, abs=0.02)


def test_disturbing_is_mild_and_leaves_some_alone():
    given = torch.randn(200, 16, 2, 6, 6)
    moved = disturb(given, 0.7, torch.Generator().manual_seed(0)) - given
    size = moved.square().mean((1, 2, 3, 4)).sqrt()
    assert 30 < (size == 0).sum() < 90
    assert size.max() < 0.5


def test_the_noise_of_a_window_carries_its_drive(settings):
    pool = stories(32, cells=8)
    pool["latents"].zero_()
    batch = dit_batch(pool, settings.dit, torch.Generator().manual_seed(1))
    found = read(batch["target"], pool["eyes"])
    apart = (found[:, None] - pool["drive"]).abs().amax((2, 3))
    assert apart.amin(1).max() < 1e-4, "each window has the drive of one of its story's windows"
    assert set(apart.argmin(1).tolist()) == {0, 1}


def test_part_of_the_noise_levels_are_those_of_the_packaged_steps():
    levels = draw_levels(4000, 0.5, torch.device("cpu"), torch.Generator().manual_seed(0))
    steps = torch.tensor(make_schedule(4, 5.0).sigmas)
    at = (levels[:, None] == steps).any(1)
    assert 0.45 < at.float().mean() < 0.55
    assert levels.min() > 0 and levels.max() <= 1


def test_steadiness_counts_only_changes_of_the_error(nets, settings):
    batch = dit_batch(stories(), settings.dit, torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain, both = (float(dit_loss(nets.dit, nets.text, batch, steady)) for steady in (0.0, 1.0))
        batch["target"] = batch["target"][:, :, :1].expand_as(batch["target"]) * 0
        still = [float(dit_loss(nets.dit, nets.text, batch, steady)) for steady in (0.0, 1.0)]
    assert both > plain
    assert still[1] == still[0], "a new model makes the velocity 0 everywhere, so this error does not change"


def falls(modules, stage, steps, loss_of):
    optimiser = Optimiser(modules, stage, Budget(1e9, 1e9, 0.0))
    first = float(loss_of().detach())
    for _ in range(steps):
        optimiser.step(loss_of())
    return float(loss_of().detach()) / first


@pytest.mark.slow
def test_the_dit_learns_one_batch(nets, settings):
    torch.manual_seed(0)
    dit, text = copy.deepcopy(nets.dit), copy.deepcopy(nets.text)
    batch = dit_batch(stories(), settings.dit, torch.Generator().manual_seed(2))
    ratio = falls({"dit": dit, "text": text}, settings.dit, 10, lambda: dit_loss(dit, text, batch, 0.5))
    assert ratio < 0.8


def test_the_audio_encoder_learns_one_batch(nets, settings):
    torch.manual_seed(0)
    net = copy.deepcopy(nets.audio)
    labels = (torch.arange(24) // 6 % 4).expand(2, -1)
    pitch = (labels + 1).repeat_interleave(640, 1) * 200
    sound = training_nets.normalise_sound(torch.sin(2 * torch.pi * pitch * torch.arange(24 * 640) / 16000))
    clips = {"phones": labels, "shape": torch.zeros(2, 24, 10)}
    ratio = falls({"audio": net}, settings.audio, 8, lambda: audio_loss(net, clips, sound, 20.0)[0])
    assert ratio < 0.5


@pytest.mark.slow
def test_the_vae_learns_one_clip(nets, settings):
    torch.manual_seed(0)
    vae = copy.deepcopy(nets.vae)
    axis = torch.linspace(-1, 1, 32)
    pixels = (axis[:, None] * axis).expand(1, 3, 5, 32, 32) * torch.linspace(0.5, 1, 5).view(1, 1, 5, 1, 1)
    weight = torch.ones(1, 5, 32, 32)
    ratio = falls({"vae": vae}, settings.vae, 8, lambda: vae_loss(vae, pixels, weight, settings.vae)[0])
    assert ratio < 0.6


def test_steadiness_of_the_vae_counts_only_changes_from_frame_to_frame(nets, settings):
    torch.manual_seed(0)
    weight = torch.ones(1, 5, 16, 16)

    def more(pixels):
        """What `steady` adds to the loss of a decoder that always gives the same frame."""
        losses = []
        for steady in (0.0, 1.0):
            torch.manual_seed(0)
            asked = replace(settings.vae, steady=steady)
            with torch.no_grad():
                losses.append(float(vae_loss(nets.vae, pixels, weight, asked)[0]))
        return losses[1] - losses[0]

    still = torch.zeros(1, 3, 5, 16, 16)
    blinking = still + torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]).view(1, 1, -1, 1, 1)
    assert more(blinking) > more(still) + 0.5
    assert more(still[:, :, :1].clone()) == 0, "single frames do not change"


def test_fidelity_tells_flicker(nets):
    frames = torch.full((1, 5, 3, 16, 16), 128, dtype=torch.uint8)
    frames[:, :, :, :8] = 40 * torch.arange(5, dtype=torch.uint8).view(1, -1, 1, 1, 1)
    found = fidelity(nets.vae, frames)
    assert set(found) == {"psnr", "texture", "flicker"} and 0 <= found["flicker"] < 50


def test_exported_files_are_read_back(nets, tmp_path):
    export(nets, tmp_path)
    (tmp_path / "dit.safetensors").unlink()
    other = training_nets.Nets.fresh(1, ROOT / "assets" / TOKENIZER)
    before = copy.deepcopy(other.dit.state_dict())
    assert load_files(other, tmp_path) == ["vae", "text_encoder", "wav2vec/model"]
    for name in ("vae", "text"):
        found, wanted = (getattr(each, name).state_dict() for each in (other, nets))
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=4e-3, atol=1e-6)
    hidden = [each.audio.wav2vec.encoder.layers[0].attention.q_proj.weight for each in (other, nets)]
    torch.testing.assert_close(*hidden, rtol=4e-3, atol=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in other.dit.state_dict().items())
    with pytest.raises(FileNotFoundError, match="neither"):
        load_files(other, tmp_path / "google")


@pytest.mark.parametrize(
    ("first", "learning"),
    [
        (0, ("conv2.", "decoder.")),
        (9, ("decoder.upsamples.9.", "decoder.upsamples.10.", "decoder.head.")),
    ],
)
def test_the_decoder_learns_alone(nets, settings, first, learning):
    torch.manual_seed(0)
    vae = copy.deepcopy(nets.vae)
    before = copy.deepcopy(vae.state_dict())
    pixels = torch.linspace(-1, 1, 16).expand(1, 3, 1, 16, 16)
    weight = torch.ones(1, 1, 16, 16)
    loss_of = lambda: vae_loss(vae, pixels, weight, settings.decoder, decoder_only=True)[0]  # noqa: E731
    assert falls(learners(vae, first), settings.decoder, 20, loss_of) < 0.9
    moved = {name for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    assert {part for part in learning if any(name.startswith(part) for name in moved)} == set(learning)
    assert all(name.startswith(learning) for name in moved)


def test_blending_keeps_as_much_as_the_decibels_allow(nets):
    torch.manual_seed(0)
    vae = copy.deepcopy(nets.vae)
    start = copy.deepcopy(vae.state_dict())
    frames = torch.randint(0, 256, (1, 1, 3, 16, 16), dtype=torch.uint8)
    for weight in vae.decoder.head.parameters():
        weight.data += 0.05
    before, after = (fidelity(each, frames)["psnr"] for each in (nets.vae, vae))
    assert after < before - 0.5
    share = blend(vae, start, frames, cost=0.5)
    assert 0 < share < 1 and before - 0.5 <= fidelity(vae, frames)["psnr"] < before
    assert blend(vae, vae.state_dict(), frames, cost=0.5) == 1.0, "nothing to take back"


def test_a_stage_longer_than_planned_is_refused(settings):
    session = Session.__new__(Session)
    session.settings, session.facts = settings, {"minutes": {"decoder": 0.7, "dit": 3.0}}
    with pytest.raises(ValueError, match=r"decoder: planned_minutes is 1, .* 0.70 .*set it to 1.20"):
        session.run("decoder", 0.5)


def test_the_audio_encoder_may_change_only_before_more_dit():
    check_order(parse_stages(["audio=1", "dit=2"]), trained=True)
    check_order(parse_stages(["vae=1", "audio=1"]), trained=False)
    with pytest.raises(ValueError, match=r"audio: .* add a dit stage after it"):
        check_order(parse_stages(["dit=2", "audio=1"]), trained=True)
    with pytest.raises(ValueError, match=r"vae: .* without --resume"):
        check_order(parse_stages(["vae=1", "dit=2"]), trained=True)


def averaged(team: object) -> torch.Tensor:
    ranks = TrainingRanks(team.rank, team.size)
    gradients = torch.arange(4.0) * ranks.index
    ranks.average(gradients)
    assert ranks.any(ranks.index == 1, torch.device("cpu")) and not ranks.any(False, torch.device("cpu"))
    return gradients


def test_ranks_take_the_mean_gradient(tmp_path):
    pool = RankPool(2, tmp_path)
    try:
        for mean in pool.run(averaged):
            torch.testing.assert_close(mean, torch.arange(4.0) / 2)
    finally:
        pool.close()


def test_the_average_follows_and_swaps(nets):
    layer = torch.nn.Linear(2, 2)
    average = training_nets.Average({"layer": layer}, 0.9)
    before = layer.weight.detach().clone()
    layer.weight.data += 1
    for _ in range(200):
        average.update()
    average.swap()
    torch.testing.assert_close(layer.weight.detach(), before + 1, atol=1e-3, rtol=0)


def test_a_pool_keeps_the_newest():
    pool = Pool(4)
    for value in range(6):
        pool.add({"x": torch.tensor([[value]])})
    assert sorted(pool.tensors["x"].flatten().tolist()) == [2, 3, 4, 5]
    assert pool.filled == 4


def test_rough_sound_is_still_in_time():
    generator = torch.Generator().manual_seed(0)
    sound = torch.zeros(8, 16000)
    sound[:, 8000:8400] = torch.randn(8, 400) * 0.3
    made = roughen(sound, generator)
    power = made.square().unflatten(1, (40, 400)).mean(2)
    assert (power[:, 20] > 3 * power[:, :19].amax(1)).float().mean() > 0.8
    assert made.isfinite().all()


def test_settings_are_strict(tmp_path):
    wrong = tmp_path / "a.yaml"
    wrong.write_text(CHECK.read_text().replace("crop:", "corp:"))
    with pytest.raises(ValueError, match=r"crop.*corp"):
        read_settings(wrong)
    assert read_settings(ROOT / "configs" / "pocket.yaml").dit.compile
    assert parse_stages(["vae=5", "dit=0.5"]) == [("vae", 5.0), ("dit", 0.5)]
    with pytest.raises(ValueError, match=r"vea=5"):
        parse_stages(["vea=5"])


def test_a_mirrored_story_mirrors_places_and_chance():
    frames = torch.full((2, 3, 3, 8, 10), 100, dtype=torch.uint8)
    frames[..., 4, 7] = 200
    mouth = torch.tensor([7.0, 4.0]).expand(2, 3, 2)
    eyes = torch.tensor([[1.0, 2.0], [4.0, 2.0]]).expand(2, 3, 2, 2)
    nothing = torch.zeros(2, 3)
    film = Film(frames, mouth, eyes, nothing, nothing, nothing, nothing, ("a", "b"))
    drive = torch.ones(2, 2, len(SIGNALS))
    last = (frames[:, :2], torch.cat([mouth[:, :2, None], eyes[:, :2]], 2))
    story = Story(film, torch.zeros(2, 1), drive, last)
    seen = mirrored(story, torch.Generator().manual_seed(0))
    assert torch.equal(seen.last[0], seen.film.frames[:, :2])
    assert torch.equal(seen.last[1], torch.cat([seen.film.mouth[:, :2, None], seen.film.eyes[:, :2]], 2))
    assert seen.film.mouth[0, 0].tolist() == [2.0, 4.0]
    assert seen.film.eyes[0, 0].tolist() == [[5.0, 2.0], [8.0, 2.0]], "the left eye has become the right one"
    assert {name for name, sign in zip(SIGNALS, seen.drive[0, 0].tolist(), strict=True) if sign < 0} == {
        *SIDEWAYS
    }
    assert (seen.film.frames.float().mean((0, 1, 2)).argmax() == 4 * 10 + 2).item()
    light = seen.film.frames[:, :, :, 0, 0].float()
    assert (light.std(1) == 0).all() and light[:, 0].std() > 1
    both = Story.join(story, seen)
    assert both.film.prompts == ("a", "b") * 2 and len(both.last[0]) == len(both.drive) == 4


def test_texture_is_the_amount_of_fine_structure_not_its_place():
    torch.manual_seed(0)
    grain = torch.randn(1, 3, 2, 32, 32)
    blurred = torch.nn.functional.avg_pool3d(grain, (1, 3, 3), 1, (0, 1, 1))
    assert texture(grain).shape == (1, 2, 4, 4)
    assert (texture(blurred) < 0.5 * texture(grain)).all()
    other = torch.randn(1, 3, 2, 32, 32)
    assert (texture(other) - texture(grain)).abs().mean() < 0.2 * texture(grain).mean()
    ramp = torch.arange(32.0).expand(1, 3, 2, 32, 32)
    assert texture(ramp).max() < 0.01
