"""FlashHead and LeapTalk by the ordinary pipeline: files, chunks, resume, live, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from engine import head_pipeline, head_settings, interrupt_in, portrait, request, voice
from media_files import write_audio
from omniavatar import AvatarPipeline, SamplingParams
from omniavatar.config.families import FAMILIES
from omniavatar.config.load import load_config
from omniavatar.engine.convert import convert_checkpoint
from omniavatar.engine.events import Message
from omniavatar.engine.recorder import RunRecorder
from omniavatar.engine.requests_file import BadLine, RequestLine, read_requests
from omniavatar.errors import CheckpointError, ConfigError, InputError, OmniAvatarError
from omniavatar.live.makers import maker_of
from omniavatar.measure.profile import profile_requests
from omniavatar.media.inspect import read_frames
from omniavatar.plan.preview import with_family
from omniavatar.plan.run import plan_run

SECONDS = 2.5
"""63 frames: two whole chunks and a part of a third."""


@pytest.fixture(scope="module", params=["flashhead", "leaptalk"])
def pipeline(heads_checkpoint, cache, request) -> AvatarPipeline:
    return head_pipeline(heads_checkpoint, cache, family=request.param)


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory) -> Path:
    """The uninterrupted video."""
    output = tmp_path_factory.mktemp("whole") / "out.mp4"
    pipeline.generate(request(SECONDS, prompt=""), output)
    return output


def test_the_files_tell_the_family_and_its_settings(pipeline):
    config, family = pipeline.config, pipeline.config.family
    assert family.name == config.model.family != "auto"
    assert config.sampling.sampler == family.samplers[0]
    assert config.sampling.num_steps == {"flashhead": 4, "leaptalk": 1}[family.name]
    assert config.video.color_match == 1 and config.video.silence_duration_s == 0
    assert pipeline.models.dit_config.audio_tokens == 32


def test_a_video_is_its_chunks(pipeline, whole):
    record = json.loads(whole.with_suffix(".json").read_text())
    plan = record["plan"]
    assert record["frames"] == len(list(read_frames(whole))) == 63
    assert (plan["windows"], plan["window_length"], plan["overlap"]) == (3, 33, 5)
    assert plan["forwards"] == 3 * pipeline.config.sampling.num_steps
    assert json.loads(record["fingerprint"]["model.family"]) == pipeline.config.family.name
    assert "video.max_tokens" not in record["fingerprint"]
    assert record["config"]["video.color_match"] == 1


def test_an_interrupted_run_continues_byte_for_byte(pipeline, whole, tmp_path):
    output, asked = tmp_path / "out.mp4", request(SECONDS, prompt="")
    interrupt_in(1, pipeline, asked, output)
    result = pipeline.generate(asked, output)
    assert result.resumed_windows == 1
    assert output.read_bytes() == whole.read_bytes()


def test_live_blocks_are_the_chunks_of_the_video(pipeline):
    asked = request(28 / 25 * 2, prompt="")
    chunks = [chunk.frames for chunk in pipeline.stream(asked)]
    maker = maker_of(pipeline, portrait(), "", None)
    sound = voice(28 / 25 * 2).samples
    for chunk in chunks:
        count = maker.missing
        maker.push(sound[:count])
        sound = sound[count:]
        assert np.array_equal(np.concatenate(list(maker.make(lambda: False))), chunk)
    with pytest.raises(InputError, match="takes no text"):
        maker.set_prompt("a man laughs")


def test_warming_up_writes_nothing_and_profiling_counts(pipeline, tmp_path):
    pipeline.warm_up()
    lines = [line_in(tmp_path)]
    config = pipeline.config.model_copy(
        update={"output": pipeline.config.output.model_copy(update={"output_dir": tmp_path})}
    )
    run = profile_requests(config, lines)
    assert {row.name for row in run.report.work} >= {"denoise", "vae_decode", "vae_encode"}


def line_in(folder: Path) -> RequestLine:
    """A request whose files are in `folder`."""
    Image.fromarray(portrait()).save(folder / "face.png")
    write_audio(folder / "voice.wav", voice(1.2).samples[None], 16000, "pcm_s16le", "mono")
    return RequestLine(0, 0, "", folder / "face.png", folder / "voice.wav")


def test_a_line_of_an_input_file_needs_no_prompt(tmp_path):
    line_in(tmp_path)
    path = tmp_path / "lines.txt"
    path.write_text("@@face.png@@voice.wav\n")
    (silent,) = read_requests(path, text=False)
    assert isinstance(silent, RequestLine) and silent.prompt == ""
    (refused,) = read_requests(path)
    assert isinstance(refused, BadLine) and "no prompt" in str(refused.error)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"audio": None}, "audio: is missing"),
        ({"continues": "old.mp4"}, "does not go on from a finished one"),
        ({"sampling": SamplingParams(sampler="euler")}, "sampler: .*its weights follow"),
        ({"sampling": SamplingParams(guidance_scale=4.5)}, "guidance_scale: .*no text to follow"),
        ({"sampling": SamplingParams(step_cache="magcache")}, "step_cache: .*is computed"),
    ],
)
def test_requests_that_are_refused(pipeline, changes, text, tmp_path):
    with pytest.raises(OmniAvatarError, match=text) as error:
        pipeline.generate(request(1.0, **{"prompt": "", **changes}), tmp_path / "out.mp4")
    assert "\n" not in str(error.value)


def test_a_prompt_is_reported_and_changes_nothing(pipeline, whole, tmp_path):
    told: list[str] = []

    def listener(event: object) -> None:
        if isinstance(event, Message):
            told.append(event.text)

    spoken = AvatarPipeline.from_config(pipeline.config, recorder=RunRecorder([listener]))
    copy = tmp_path / "out.mp4"
    copy.write_bytes(whole.read_bytes())
    copy.with_suffix(".json").write_bytes(whole.with_suffix(".json").read_bytes())
    result = spoken.generate(request(SECONDS, prompt="a man laughs"), copy)
    assert any("the prompt has no effect" in text for text in told)
    assert any("is finished already" in text for text in told), "a prompt must not be part of the identity"
    assert result.frames == 63


def test_every_refused_setting_has_its_reason(heads_checkpoint, cache):
    """Each setting that a family refuses is refused in one line with the reason of its record."""
    values = {
        "max_tokens": 20000, "overlap_frame": 9, "fps": 16, "guidance_scale": 3.0, "audio_scale": 2.0,
        "guidance_interval": [0.0, 0.5], "step_cache": "magcache", "tea_cache_l1_thresh": 0.1,
        "exp_path": "folder", "input_limits": "limits.json", "sp_size": 2, "cfg_parallel": 2,
        "audio_proj_path": "projector.pt", "latent_encoder": "taehv", "sparse_attention": "window",
        "use_fsdp": True, "exchange": "direct", "sparse_density": 0.5, "sparse_mass": 0.9,
        "sparse_dense_steps": 1, "sparse_block_size": 64, "sparse_file": "plan", "sparse_backend": "flex",
    }  # fmt: skip
    for family in FAMILIES:
        for setting, reason in family.refused.items():
            leaf = setting.partition(".")[2].partition("=")[0]
            given = {"family": family.name, leaf: values[leaf]}
            with pytest.raises(ConfigError) as error:
                load_config(None, given)
            assert reason in str(error.value) and leaf in str(error.value), (family.name, setting)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["flashhead", "omniavatar"])
def test_weights_of_another_family(heads_checkpoint, nano_checkpoint, cache, name):
    """A family that contradicts the keys is refused; LeapTalk's settings on other files too."""
    values = head_settings(heads_checkpoint, cache, "flashhead")
    if name == "flashhead":
        base = nano_checkpoint / "Wan2.1-T2V-nano" / "diffusion_pytorch_model.safetensors"
        values["dit_path"] = str(base)
    with pytest.raises(CheckpointError, match=f"but family is {name}; leave family out"):
        with_family(load_config(None, {**values, "family": name}).config)


def test_families_with_equal_keys_are_told_by_projector_and_header(heads_checkpoint, cache, tmp_path):
    plain = head_settings(heads_checkpoint, cache, "flashhead")
    with pytest.raises(ConfigError, match=r"family: .* is FlashHead's.*set audio_proj_path and loras"):
        with_family(load_config(None, {**plain, "family": "leaptalk"}).config)
    whole = load_config(None, head_settings(heads_checkpoint, cache, "leaptalk")).config
    merged = str(convert_checkpoint(whole, tmp_path / "merged.safetensors").path)
    with pytest.raises(CheckpointError, match=r"merged.*has the header of leaptalk, but family is flashhead"):
        with_family(load_config(None, {**plain, "dit_path": merged, "family": "flashhead"}).config)
    named = load_config(None, {**plain, "dit_path": merged, "family": "leaptalk"}).config
    assert with_family(named).family.name == "leaptalk"


def test_settings_that_the_keys_contradict(heads_checkpoint, cache):
    settings = head_settings(heads_checkpoint, cache, "flashhead", sampler="euler")
    with pytest.raises(ConfigError, match="sampler: flashhead: its weights follow renoise"):
        AvatarPipeline.from_config(load_config(None, settings).config)


def test_only_the_released_unused_layers_may_be_left_over(heads_checkpoint, cache, tmp_path):
    settings = head_settings(heads_checkpoint, cache, "flashhead")
    stored = load_file(settings["dit_path"])
    for key, value in (("mlp.0.weight", torch.zeros(2, 2)), ("text_embedding.0.bias", None)):
        changed = dict(stored)
        if value is None:
            del changed[key]
        else:
            changed[key] = value
        save_file(changed, tmp_path / "dit.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"num_heads": 2}))
        made = head_pipeline(heads_checkpoint, cache, dit_path=str(tmp_path / "dit.safetensors"))
        made.adopt(plan_run(made.config, (32, 32), 16000))
        if value is None:
            assert made.models.dit.config.audio_tokens
        else:
            with pytest.raises(CheckpointError, match=r"unexpected: mlp\.0\.weight"):
                made.models.dit  # noqa: B018


def test_a_projector_replaces_all_ten_weights_or_none(heads_checkpoint, cache, tmp_path):
    settings = head_settings(heads_checkpoint, cache, "leaptalk")
    released = torch.load(settings["audio_proj_path"])
    assert len(released) == 10 and not any("audio_proj" in key for key in released)
    less = {key: value for key, value in released.items() if key != "norm.bias"}
    path = tmp_path / "projector.pt"
    made = head_pipeline(heads_checkpoint, cache, family="leaptalk", audio_proj_path=str(path))
    made.adopt(plan_run(made.config, (32, 32), 16000))
    whole = released["norm.bias"].to(torch.int64)
    for stored, text in (
        (
            {**less, "proj4.weight": torch.zeros(1)},
            r"missing: audio_proj\.norm\.bias; unexpected: audio_proj\.proj4",
        ),
        ({**released, "norm.bias": torch.zeros(3)}, r"of another shape: audio_proj\.norm\.bias"),
        ({**released, "norm.bias": whole}, r"audio_proj\.norm\.bias holds numbers of torch.int64"),
    ):
        torch.save(stored, path)
        with pytest.raises(CheckpointError, match=text) as error:
            made.models.dit  # noqa: B018
        assert str(error.value).startswith(f"{path}: ")


def test_a_converted_leaptalk_stays_one(heads_checkpoint, cache, tmp_path):
    config = load_config(None, head_settings(heads_checkpoint, cache, "leaptalk")).config
    done = convert_checkpoint(config, tmp_path / "merged.safetensors")
    merged = head_pipeline(heads_checkpoint, cache, dit_path=str(done.path))
    assert merged.config.family.name == "leaptalk"
    original = AvatarPipeline.from_config(config)
    tensors = []
    for made in (merged, original):
        made.adopt(plan_run(made.config, (32, 32), 16000))
        tensors.append(made.models.dit.state_dict())
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items())


def test_without_a_vae(heads_checkpoint, cache):
    """TAEHV in both directions needs no VAE file, and its latents go from chunk to chunk."""
    tiny = str(heads_checkpoint / "LeapTalk" / "taew2_1.pth")
    changes = {"decoder": "taehv", "decoder_path": tiny, "latent_encoder": "taehv", "vae_path": None}
    made = head_pipeline(heads_checkpoint, cache, family="leaptalk", hand_over="latents", **changes)
    frames = [chunk.frames for chunk in made.stream(request(2.0, prompt=""))]
    assert [len(each) for each in frames] == [28, 22]
    assert made.models.vae.encode(torch.zeros(1, 3, 5, 32, 32)).shape == (1, 16, 2, 4, 4)
    pixels = made.stream(replace(request(2.0, prompt="")))
    assert np.array_equal(np.concatenate(frames), np.concatenate([chunk.frames for chunk in pixels]))
