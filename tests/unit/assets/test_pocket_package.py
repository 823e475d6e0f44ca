"""The packaged model's place: names that find it anywhere, its portrait, its demo, warnings of odd inputs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from training import export as exporting
from training import input_limits
from training.export_live import CONFIG as LIVE
from training.export_live import TEMPLATE, export
from training.head import Head
from training.live_session import tiny_of
from training.looks import draw_looks
from training.nets import Nets, save_shards
from training.portraits import portrait
from training.render import Renderer
from training.scale import SIZE
from training.settings import read_live_settings

from engine import voice
from omniavatar import AvatarPipeline, AvatarRequest
from omniavatar.assets import pocket
from omniavatar.cli import main
from omniavatar.config.load import load_config
from omniavatar.config.values import POCKET_WEIGHTS
from omniavatar.encoders.input_limits import InputLimits, outlines, thumbnail
from omniavatar.engine.events import Message
from omniavatar.engine.recorder import RunRecorder
from omniavatar.errors import CheckpointError, ConfigError
from omniavatar.media.inspect import read_frames

ROOT = Path(__file__).resolve().parents[3]
PORTRAIT_SEED = 50_013
SMALL = {"max_tokens": 396, "num_steps": 1, "preset": "ultrafast"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Fresh weights as training exports them."""
    folder = tmp_path_factory.mktemp("weights")
    tokenizer = exporting.ASSETS / exporting.TOKENIZER
    assert exporting.export(Nets.fresh(0, tokenizer), folder) < 32 * 2**20
    return folder


@pytest.fixture(scope="module")
def live_config(tmp_path_factory):
    """The configuration of a student that is the packaged DiT, with a fresh small decoder."""
    folder = tmp_path_factory.mktemp("live")
    dit = load_file(POCKET_WEIGHTS / "dit.safetensors")
    save_shards({name: value.float() for name, value in dit.items()}, folder, "student")
    save_shards(tiny_of(read_live_settings(TEMPLATE.parent / "live.yaml")).state_dict(), folder, "tiny")
    export(folder, folder, folder / "files")
    return folder / "files" / LIVE


@pytest.mark.parametrize(("name", "file"), [("pocket", "pocket.yaml"), ("pocket-live", "pocket_live.yaml")])
def test_config_is_found_by_name_from_anywhere(tmp_path, monkeypatch, name, file):
    assert (pocket.FOLDER / file).read_bytes() == (ROOT / "configs" / file).read_bytes()
    monkeypatch.chdir(tmp_path)
    named, read = load_config(name).config, load_config(ROOT / "configs" / file).config
    assert named == read
    named.model.check_files_named()
    assert named.model.vae_path == pocket.FOLDER / "weights" / "vae.safetensors"
    assert POCKET_WEIGHTS == pocket.FOLDER / "weights"
    assert named.video.sizes == ((SIZE, SIZE),)
    with pytest.raises(ConfigError, match="pocket"):
        load_config("pockets")


def test_exported_config_names_the_exported_files(weights):
    model = load_config(weights / "config.yaml").config.model
    model.check_files_named()
    named = (
        *model.dit_path,
        model.vae_path,
        model.text_encoder_path,
        model.tokenizer_folder,
        model.wav2vec_path,
    )
    assert all(path.exists() and weights in path.parents for path in named)
    assert model.input_limits is None


def test_packaged_portrait_is_the_held_out_render():
    made = portrait(Renderer(Head("cpu"), SIZE), PORTRAIT_SEED)
    packaged = np.asarray(Image.open(pocket.PORTRAIT))
    assert np.abs(made.astype(int) - packaged).mean() < 0.5
    with pytest.raises(ValueError, match="held out"):
        portrait(Renderer(Head("cpu"), SIZE), 100_000)


@pytest.mark.slow
def test_demo_describes_its_model_and_names_the_video(live_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pocket, "LIVE_CONFIG", live_config)
    output = tmp_path / "demo.mp4"
    settings = "preset=ultrafast,image_sizes_720=[[64,64]]"
    with pytest.raises(SystemExit) as ended:
        main(["demo", "-o", str(output), "--hp", f"{settings},text_cache_dir={tmp_path / 'cache'}"])
    assert ended.value.code == 0
    frames = list(read_frames(output))
    assert len(frames) == 160 and frames[0].shape == (64, 64, 3)
    said = capsys.readouterr().err
    assert "it does not work on photographs" in said and str(output) in said


@pytest.fixture(scope="module")
def limits():
    """Limits by a few portraits, a VAE that loses nothing, and speech that is where features are large."""
    renderer = Renderer(Head("cpu"), SIZE)
    heads = [portrait(renderer, 71_000 + number) for number in range(40)]
    rooms = (draw_looks(renderer.head, 6, 3, SIZE).background * 255).byte().permute(0, 2, 3, 1).numpy()
    speech = np.array([1.0, 1.0, 0.0, 0.0]), -1.0
    return input_limits.portrait_limits(heads, rooms, lambda picture: picture + 0.1, speech)[0]


def notes(limits, pixels, lost=0.0):
    picture = input_limits.as_picture(pixels)
    return limits.portrait_notes(picture, picture + lost)


@pytest.mark.slow
def test_rendered_heads_pass_and_other_pictures_are_warned_of(limits):
    head = np.asarray(Image.open(pocket.PORTRAIT))
    assert not notes(limits, head)
    rng = np.random.default_rng(0)
    others = {
        "noise": rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8),
        "black": np.zeros((SIZE, SIZE, 3), np.uint8),
        "landscape": np.repeat(np.linspace(220, 60, SIZE).astype(np.uint8), SIZE * 3).reshape(SIZE, SIZE, 3),
        "upside down": head[::-1].copy(),
    }
    for name, pixels in others.items():
        found = notes(limits, pixels)
        assert len(found) == 1 and "with a photograph the face may change or dissolve" in found[0], name
    assert "the VAE loses detail" in notes(limits, head, lost=0.3)[0]


@pytest.mark.slow
def test_sound_without_speech_is_warned_of(limits):
    speech, noise = np.full((100, 5), 2.0, np.float32), np.zeros((100, 5), np.float32)
    assert not limits.speech_notes(speech)
    assert "only 0% of it is speech" in limits.speech_notes(noise)[0]
    assert not limits.speech_notes(np.concatenate([speech[:50], noise])), "a third is speech"
    assert not limits.speech_notes(noise[:10]), "less than a second is not judged"


def test_classifier_parts_what_can_be_parted():
    rng = np.random.default_rng(0)
    wanted, other = rng.normal(1, 1, (50, 6)), rng.normal(-1, 1, (80, 6))
    weights, bias = input_limits.classifier(wanted, other)
    assert np.mean(wanted @ weights + bias > 0) > 0.9 and np.mean(other @ weights + bias < 0) > 0.9


@pytest.mark.slow
def test_limits_are_kept_in_a_file(limits, tmp_path):
    path = tmp_path / "input_limits.json"
    limits.save(path, {"portraits": 40})
    assert path.stat().st_size < 2**18
    again = InputLimits.load(path)
    picture = input_limits.as_picture(np.asarray(Image.open(pocket.PORTRAIT)))
    assert again.head_score(outlines(picture)) == pytest.approx(
        limits.head_score(outlines(picture)), abs=5e-3
    )
    assert again.left_over(thumbnail(picture)) == pytest.approx(
        limits.left_over(thumbnail(picture)), abs=5e-3
    )
    for text in ("", "[]", json.dumps({"format": 2, "measured": {}})):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="input_limits"):
            InputLimits.load(path)


@pytest.mark.slow
def test_odd_inputs_are_warned_of_and_make_a_video_all_the_same(weights, limits, tmp_path):
    """A picture of noise with a voice of noise, through the whole engine."""
    file = tmp_path / "input_limits.json"
    hidden = 192
    deaf = replace(limits, speech_weights=np.zeros(2 * hidden), speech_bias=-1.0)
    deaf.save(file, {})
    said = []
    recorder = RunRecorder([lambda event: isinstance(event, Message) and said.append(event.text)])
    settings = {**SMALL, "text_cache_dir": str(tmp_path / "cache"), "input_limits": str(file)}
    config = load_config(weights / "config.yaml", settings).config
    pixels = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    pipeline = AvatarPipeline.from_config(config, recorder=recorder)
    result = pipeline.generate(AvatarRequest("noise", pixels, voice(1.2)), tmp_path / "out.mp4")
    assert result.frames == len(list(read_frames(result.output)))
    warned = [text for text in said if text.startswith(("image: differs", "audio: only 0% of it is speech"))]
    assert len(warned) == 2


def test_all_packaged_weights_stay_small():
    files = [path for path in POCKET_WEIGHTS.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"dit.safetensors", "live.safetensors"}
    assert sum(path.stat().st_size for path in files) <= 40 * 2**20
