"""Configurations of folders of weights: derived, found, and what is said where something is missing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from command_line import REPOSITORY
from engine import portrait, voice
from omniavatar import AvatarPipeline, AvatarRequest
from omniavatar.checkpoint.layout import TOKEN_FAMILIES, checkpoint_spec
from omniavatar.checkpoint.layout_families import PRO_CONFIG, side_files
from omniavatar.checkpoint.layout_files import checkpoint_layout, dit_paths
from omniavatar.checkpoint.synthetic import make_checkpoint
from omniavatar.config.identity import flat_values
from omniavatar.config.load import load_config
from omniavatar.engine.pretrained import pretrained_config
from omniavatar.errors import CheckpointError, ConfigError

ENCODERS = (
    "Wan2.1-T2V-{}/models_t5_umt5-xxl-enc-bf16.pth",
    "Wan2.1-T2V-{}/Wan2.1_VAE.pth",
    "Wan2.1-T2V-{}/google/umt5-xxl/tokenizer.json",
    "wav2vec2-base-960h/model.safetensors",
    "wav2vec2-base-960h/config.json",
)
ADAPTER = ("OmniAvatar-{}/pytorch_model.pt", "OmniAvatar-{}/config.json")


def lay_out(root: Path, name: str) -> Path:
    """Empty files where the weights of a checkpoint lie."""
    spec = checkpoint_spec(name)
    if spec.family in TOKEN_FAMILIES:
        for layout in checkpoint_layout(spec):
            (root / layout.path).parent.mkdir(parents=True, exist_ok=True)
            (root / layout.path).touch()
        for path, content in side_files(spec).items():
            (root / path).write_text(json.dumps(content))
        (root / "wav2vec2-base-960h/config.json").write_text("{}")
        return root
    files = [*ENCODERS, *(() if spec.merged else ADAPTER)]
    for file in [*dit_paths(spec), *(file.format(spec.name) for file in files)]:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return root


@pytest.mark.parametrize(
    "name, file",
    [
        ("1.3B", "inference_1.3B.yaml"),
        ("14B", "inference.yaml"),
        ("livetalk", "livetalk.yaml"),
        ("nano", "nano.yaml"),
        ("flashhead", "flashhead.yaml"),
        ("leaptalk", "leaptalk.yaml"),
    ],
)
def test_the_derived_settings_are_those_of_the_configuration(tmp_path, name, file):
    root = lay_out(tmp_path / "pretrained_models", name)
    derived = flat_values(pretrained_config(root))
    given = flat_values(load_config(REPOSITORY / "configs" / file).config)
    below = f"pretrained_models/{name}" if name == "nano" else "pretrained_models"
    for key, value in given.items():
        expected = str(value).replace(below, str(root)) if "path" in str(value) + key else str(value)
        assert " ".join(str(derived[key]).split()) == " ".join(expected.split()), key


def test_a_made_checkpoint_makes_a_video(nano_checkpoint, tmp_path):
    changes = {"image_sizes_720": [[64, 64]], "max_tokens": 56, "num_steps": 1, "seq_len": 9, "device": "cpu"}
    with AvatarPipeline.from_pretrained(
        nano_checkpoint, {**changes, "text_cache_dir": str(tmp_path)}
    ) as pipe:
        made = pipe.generate(AvatarRequest("a person", portrait()), tmp_path / "x.mp4")
    assert made.frames == 9


@pytest.mark.slow
def test_a_made_livetalk_is_found(tmp_path):
    config = pretrained_config(make_checkpoint("livetalk-nano", tmp_path))
    assert config.sampling.sampler == "causal" and config.model.dtype == "fp32"
    AvatarPipeline.from_config(config).close()


@pytest.mark.parametrize(("scale", "family"), [(None, "leaptalk"), ("flashhead-nano", "flashhead")])
def test_a_made_leaptalk_holds_flashhead_too(heads_checkpoint, cache, tmp_path, scale, family):
    changes = {"image_sizes_720": [[32, 32]], "device": "cpu", "text_cache_dir": str(cache)}
    with AvatarPipeline.from_pretrained(heads_checkpoint, changes, scale) as pipe:
        assert pipe.config.family.name == family and pipe.config.model.dtype == "fp32"
        made = pipe.generate(AvatarRequest("", portrait(), voice(0.5)), tmp_path / "x.mp4")
    assert made.frames == 13


def test_models_of_heads_beside_others_need_a_choice(tmp_path):
    root = lay_out(lay_out(tmp_path, "1.3B"), "flashhead")
    with pytest.raises(ConfigError, match=r"holds 1.3B, flashhead; choose one with scale='1.3B'"):
        pretrained_config(root)
    assert pretrained_config(root, scale="flashhead").model.family == "flashhead"
    (root / "SoulX-FlashHead-1_3B/VAE_Wan/Wan2.1_VAE.pth").unlink()
    assert pretrained_config(root).model.family == "auto"


def test_the_packaged_model():
    assert flat_values(pretrained_config("pocket")) == flat_values(load_config("pocket").config)


def test_overrides_as_texts_and_as_a_mapping(tmp_path):
    root = lay_out(tmp_path, "1.3B")
    assert pretrained_config(root, ["num_steps=7,guidance_scale=2"]).sampling.num_steps == 7
    assert pretrained_config(root, "num_steps=8").sampling.num_steps == 8
    assert pretrained_config(str(root), {"sampling.num_steps": 9}).sampling.num_steps == 9


def test_a_folder_with_two_models_needs_a_choice(tmp_path):
    root = lay_out(lay_out(tmp_path, "1.3B"), "livetalk")
    with pytest.raises(ConfigError, match=r"holds 1.3B, livetalk; choose one with scale='1.3B'"):
        pretrained_config(root)
    assert pretrained_config(root, scale="livetalk").sampling.sampler == "causal"
    with pytest.raises(ConfigError, match=r"'2B' is unknown; choose one of 14B"):
        pretrained_config(root, scale="2B")


MISSING = [
    (lambda root: None, "does not exist; give the folder that `omniavatar download 1.3B"),
    (lambda root: root.write_text(""), "is a file; use from_config"),
    (lambda root: root.mkdir(), "holds no weights of 14B, 1.3B, nano, livetalk"),
    (
        lambda root: (lay_out(root, "1.3B") / "Wan2.1-T2V-1.3B/Wan2.1_VAE.pth").unlink(),
        "1.3B lacks Wan2.1-T2V-1.3B/Wan2.1_VAE.pth; `omniavatar download 1.3B --root",
    ),
    (
        lambda root: shutil.rmtree(lay_out(root, "1.3B") / "OmniAvatar-1.3B"),
        "1.3B lacks OmniAvatar-1.3B/pytorch_model.pt, OmniAvatar-1.3B/config.json;",
    ),
    (
        lambda root: next((lay_out(root, "14B") / "Wan2.1-T2V-14B").glob("*00002-of*")).unlink(),
        "14B lacks Wan2.1-T2V-14B/diffusion_pytorch_model-00002-of-00006.safetensors;",
    ),
    (
        lambda root: (lay_out(root, "flashhead") / "SoulX-FlashHead-1_3B/VAE_Wan/Wan2.1_VAE.pth").unlink(),
        "flashhead lacks SoulX-FlashHead-1_3B/VAE_Wan/Wan2.1_VAE.pth; `omniavatar download flashhead --root",
    ),
    (
        lambda root: (lay_out(root, "leaptalk-nano") / PRO_CONFIG).write_text("{"),
        "SoulX-FlashHead-1_3B/Model_Pro/config.json: is not valid JSON",
    ),
    (
        lambda root: shutil.rmtree(lay_out(root, "nano") / "wav2vec2-base-960h"),
        "`omniavatar make-checkpoint --scale nano --out",
    ),
]


@pytest.mark.parametrize("prepare, text", MISSING)
def test_what_is_missing_is_named(tmp_path, prepare, text):
    root = tmp_path / "models"
    prepare(root)
    with pytest.raises(CheckpointError) as caught:
        AvatarPipeline.from_pretrained(root)
    assert str(caught.value).startswith(str(root)) and text in str(caught.value)


def test_one_part_of_a_model_leads_to_the_folder_above(tmp_path):
    root = lay_out(tmp_path, "1.3B")
    with pytest.raises(CheckpointError, match=f"give the folder above, {root}"):
        pretrained_config(root / "OmniAvatar-1.3B")


def test_an_asked_for_model_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"14B lacks .*Wan2.1-T2V-14B"):
        pretrained_config(lay_out(tmp_path, "1.3B"), scale="14B")


def test_a_configuration_in_the_folder_counts_from_there(tmp_path):
    root = lay_out(tmp_path / "mine", "1.3B")
    (root / "mine.yaml").write_text(
        "num_steps: 3\n"
        "dit_path: Wan2.1-T2V-1.3B/a.safetensors, pocket:dit.safetensors\n"
        "model: {vae_path: vae.pth, exp_path: OmniAvatar-1.3B}\n"
        "loras: [{path: one.safetensors, strength: 0.5}, two.safetensors]\n"
        f"text_encoder_path: {tmp_path}/text.pth\n"
        "step_cache_file: none\n"
    )
    (root / "OmniAvatar-1.3B/config.json").write_text('{"seq_len": 77}')
    config = pretrained_config(root, {"seed": 5})
    assert (config.sampling.num_steps, config.sampling.seed, config.video.seq_len) == (3, 5, 77)
    model = config.model
    assert model.dit_path[0] == root / "Wan2.1-T2V-1.3B/a.safetensors"
    assert model.dit_path[1].is_file() and model.dit_path[1].is_absolute()
    assert model.vae_path == root / "vae.pth" and model.text_encoder_path == tmp_path / "text.pth"
    assert [lora.path for lora in model.loras] == [root / "one.safetensors", root / "two.safetensors"]
    assert config.sampling.step_cache_file == "none"
    (root / "other.yaml").touch()
    with pytest.raises(ConfigError, match=r"several configurations \(mine.yaml, other.yaml\)"):
        pretrained_config(root)


def test_relative_folders(tmp_path, monkeypatch):
    lay_out(tmp_path / "models", "1.3B")
    monkeypatch.chdir(tmp_path)
    assert os.path.exists(pretrained_config("models").model.vae_path or "")
