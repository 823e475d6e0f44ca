"""Plan, benchmark, deadline and calibration of models that work in chunks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from command_line import PORTRAIT, SPEECH
from omniavatar.checkpoint.layout import checkpoint_spec, dit_tensors, scale_spec
from omniavatar.checkpoint.layout_families import LORA, PRO_DIT, PROJECTOR, TINY, family_layout
from omniavatar.cli.main import app
from omniavatar.config.load import load_config
from omniavatar.config.schema import PipelineConfig
from omniavatar.errors import ConfigError
from omniavatar.measure import flops
from omniavatar.measure.benchmark.row import Options, measure
from omniavatar.measure.benchmark.rows import MeasuredRow
from omniavatar.measure.benchmark.tips import guide_tips
from omniavatar.measure.calibrate import calibrate
from omniavatar.measure.deadline import propose
from omniavatar.measure.sparse_calibration import calibrate_sparse
from omniavatar.plan.estimate import estimate_memory
from omniavatar.plan.run import plan_run
from omniavatar.plan.sharing import shared_among
from omniavatar.types import AvatarRequest

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
NANO = "weights=random,scale=nano,device=cpu,dtype=fp32,image_sizes_720=[[32,32]],preset=ultrafast"


def config(name: str) -> PipelineConfig:
    return load_config(CONFIGS / f"{name}.yaml").config


@pytest.mark.parametrize(("name", "forwards"), [("flashhead", 1072), ("leaptalk", 268)])
def test_the_plan_of_five_minutes(name: str, forwards: int) -> None:
    plan = plan_run(config(name), (512, 512), 300 * 16000)
    assert (plan.frames, len(plan.windows), plan.forwards, plan.tokens) == (7500, 268, forwards, 9216)
    assert plan.audio_delay_s == 0 and plan.padded_audio_frames == 268 * 35
    report = json.loads(
        CliRunner()
        .invoke(app, ["plan", "-c", str(CONFIGS / f"{name}.yaml"), "--minutes", "5", "--json"])
        .stdout
    )
    assert report["forwards"] == forwards and report["chunk"]["frames"] == 33


def test_memory_counts_what_the_family_loads() -> None:
    cpu = torch.device("cpu")
    full, light = (
        estimate_memory(each, plan_run(each, (512, 512), 16000), cpu)
        for each in (config("flashhead"), config("leaptalk"))
    )
    assert full.text_encoder == light.text_encoder == 0
    assert full.dit == light.dit and full.vae > 10 * light.vae
    assert light.vae == 2 * 11_315_539


def test_released_files_have_the_published_sizes() -> None:
    counts = {
        layout.path: (len(layout.tensors), sum(each.shape.numel() for each in map(_meta, layout.tensors)))
        for layout in family_layout(checkpoint_spec("leaptalk"))
    }
    assert counts[PRO_DIT] == (843, 1_507_694_912)
    assert counts[LORA] == (480, 47_185_920)
    assert counts[PROJECTOR] == (10, 86_823_424)
    assert counts[TINY][1] == 11_315_539


def _meta(entry: object) -> torch.Tensor:
    return torch.empty(entry.shape, device="meta")  # type: ignore[attr-defined]


def test_work_of_a_forward_counts_the_tokens_of_each_frame() -> None:
    sizes = scale_spec("1.3B", "flashhead").dit
    text = flops.forward_work(sizes, (9, 64, 64), text_tokens=512)
    audio = flops.forward_work(sizes, (9, 64, 64))
    assert text.matrix == audio.matrix
    assert text.attention - audio.attention == 4 * 9216 * 1536 * 30 * (512 - 32)
    assert sum(1 for _ in dit_tensors(sizes)) == 843 - 4 - 8


@pytest.mark.parametrize("name", ["flashhead", "leaptalk"])
def test_what_it_cannot_follow_is_one_line(name: str) -> None:
    made = config(name)
    with pytest.raises(ConfigError, match=f"--gpus: .*{name}: a video is made on one GPU"):
        shared_among(made, 2, "--gpus: lists 2 GPUs")
    with pytest.raises(ConfigError, match=f"{name}: .*no step cache to calibrate"):
        calibrate(made, AvatarRequest("", "none.png", "none.wav"))
    with pytest.raises(ConfigError, match=f"sparse_attention: {name}: each latent frame attends"):
        calibrate_sparse(made, AvatarRequest("", "none.png", "none.wav"))
    assert [tip.tip for tip in guide_tips(made, lambda changed: 1.0)] == ["few persistent parameters"]


@pytest.mark.slow
def test_profiling_needs_no_prompt_and_silence_is_refused_in_one_line(tmp_path: Path) -> None:
    given = ["-c", str(CONFIGS / "leaptalk.yaml"), "--hp", NANO, "--image", PORTRAIT]
    to = ["--hp", f"output_dir={tmp_path}"]
    done = CliRunner().invoke(app, ["profile", *given, "--audio", SPEECH, *to])
    assert done.exit_code == 0, done.output
    assert "forwards: 6 computed" in done.output
    omni = ["-c", "pocket", "--image", PORTRAIT, *to]
    refused = CliRunner().invoke(app, ["profile", *omni])
    assert refused.exit_code == 2 and "--prompt is missing" in refused.stderr
    silent = CliRunner().invoke(app, ["generate", *given, "--output", str(tmp_path / "out.mp4")])
    assert silent.exit_code == 3
    assert "audio: is missing; leaptalk makes its frames from a voice" in silent.stderr
    assert "the video is silent" not in silent.stderr


@pytest.mark.slow
def test_a_benchmark_row_and_a_deadline() -> None:
    options = Options(str(CONFIGS / "leaptalk.yaml"), "", (NANO,), warm_up=0, repeats=1, minutes=(0.1,))
    row = measure(options)
    assert isinstance(row, MeasuredRow)
    assert (row.tokens, row.window_length, row.steps, row.branches) == (36, 33, 1, 1)
    assert row.timings["forward"].median > 0 < row.timings["audio_features"].median
    made = load_config(CONFIGS / "leaptalk.yaml", [NANO]).config
    found = propose(made, 0.1, 600, repeats=1)
    assert found.chosen is not None and found.chosen.settings == {}
    assert found.loading_parts["prompt"] == 0
