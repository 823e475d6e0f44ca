"""`generate` in several processes: the same video, how work is shared, and failures that end all ranks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import typer

from omniavatar.cli.common import user_errors
from omniavatar.cli.ranks import config_for_rank, parse_gpus, start_ranks
from omniavatar.config.load import load_config
from omniavatar.config.schema import PipelineConfig
from omniavatar.engine.pipeline import AvatarPipeline
from omniavatar.errors import ConfigError, ResourceError
from omniavatar.media.inspect import probe_video
from omniavatar.parallel.launch import launch
from omniavatar.parallel.process import Process, lost_another
from rank_commands import FAULTS, check_fault, generate_command

LONG = "import time; time.sleep(600)"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, sys; rank = int(os.environ['RANK'])\n{code}"]


@pytest.mark.slow
def test_launch_waits_for_all_and_gives_each_its_rank(tmp_path: Path) -> None:
    note = f"open(os.path.join({str(tmp_path)!r}, os.environ['RANK'] + 'of' + os.environ['WORLD_SIZE']), 'w')"
    assert launch(python(note), ["a", "b", "c"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0of3", "1of3", "2of3"]


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_ends_the_others_with_its_code(failing: int) -> None:
    begun = time.monotonic()
    assert launch(python(f"sys.exit(5) if rank == {failing} else None\n{LONG}"), ["a", "b"]) == 5
    assert time.monotonic() - begun < 300


@pytest.mark.slow
def test_a_killed_process_is_named() -> None:
    begun = time.monotonic()
    kill = "import signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(ResourceError, match=r"rank 1 \(GPU 3\): its process was killed by SIGKILL"):
        launch(python(f"if rank: {kill}\n{LONG}"), ["rank 0 (GPU 2)", "rank 1 (GPU 3)"])
    assert time.monotonic() - begun < 300


def test_an_interrupt_is_reported_by_rank_0_alone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import omniavatar.parallel.launch

    def interrupted(command: list[str], names: list[str]) -> int:
        assert command[-2:] == ["generate", "x"] and names == ["rank 0 (GPU 2)", "rank 1 (GPU 5)"]
        raise KeyboardInterrupt

    monkeypatch.setattr(omniavatar.parallel.launch, "launch", interrupted)
    with user_errors(), pytest.raises(typer.Exit) as leaving:
        start_ranks(["generate", "x"], [2, 5])
    assert leaving.value.exit_code == 130 and capfd.readouterr().err == ""


def config(**changes: object) -> PipelineConfig:
    return load_config(None, {"weights": "random", "scale": "nano", "device": "cpu", **changes}).config


def test_gpus_are_shared_by_guidance_first() -> None:
    def shares(count: int, **changes: object) -> tuple[int, int]:
        runtime = config_for_rank(config(**changes), list(range(count)), Process()).runtime
        return runtime.cfg_parallel, runtime.sp_size

    assert shares(1) == (1, 1)
    assert shares(2) == (2, 1) and shares(4) == (2, 2) and shares(3) == (1, 3)
    assert shares(3, audio_scale=3.0) == (3, 1)
    assert shares(2, guidance_scale=1.0) == (1, 2)
    assert shares(2, guidance_interval=[0.0, 0.5]) == (1, 2)
    assert shares(2, sp_size=2) == (1, 2)


@pytest.mark.parametrize(
    ("changes", "gpus", "world", "message"),
    [
        ({}, None, 2, "torchrun started 2 processes, .* is 1; use --nproc_per_node=1 or --hp=sp_size=2"),
        ({"sp_size": 4}, None, 2, "is 4; use --nproc_per_node=4"),
        ({"sp_size": 2}, None, 1, "1 process runs, .* is 2"),
        ({"sp_size": 2, "cfg_parallel": 2}, [0, 1], 1, "--gpus: lists 2 GPUs, .* is 4"),
        ({"sp_size": 2, "device": "cuda:1"}, None, 2, "device: cuda:1 is one GPU, but the run uses several"),
    ],
)
def test_a_wrong_number_of_processes_is_an_error(
    changes: dict[str, object], gpus: list[int] | None, world: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config_for_rank(config(**changes), gpus, Process(world=world))


@pytest.mark.parametrize("text", ["0,0", "a", "", "0,-1", "1;2"])
def test_invalid_gpu_lists(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpus"):
        parse_gpus(text)


def test_a_pipeline_of_several_processes_is_not_made_by_one() -> None:
    with pytest.raises(ConfigError, match="2 processes are configured, but 1 runs"):
        AvatarPipeline(config(sp_size=2))


def test_only_errors_of_an_exchange_blame_another_process() -> None:
    assert lost_another(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert not lost_another(RuntimeError("shape mismatch")) and not lost_another(ValueError("NCCL"))


@pytest.fixture(scope="module")
def command(nano_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return generate_command(nano_checkpoint, tmp_path_factory.mktemp("inputs"))


def generated(command: list[str], output: Path, *more: str) -> Path:
    program = [sys.executable, "-m", "omniavatar.cli", *command, "--quiet", "--hp=vae=fast"]
    program += ["--output", str(output), *more]
    made = subprocess.run(program, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stderr
    assert made.stdout == f"{output}\n" and "error" not in made.stderr
    return output


@pytest.fixture(scope="module")
def video_of_one(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generated(command, tmp_path_factory.mktemp("one") / "one.mp4")


def frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]).astype(int)


@pytest.mark.parametrize(
    "shares", ["sp_size=2,use_fsdp=true,vae_parallel=false", "cfg_parallel=2,vae_parallel=true"]
)
def test_a_video_of_two_processes_equals_that_of_one(
    shares: str, command: list[str], video_of_one: Path, tmp_path: Path
) -> None:
    two = generated(command, tmp_path / "two.mp4", "--gpus", "0,1", f"--hp={shares}")
    apart = np.abs(frames(video_of_one) - frames(two))  # one level, before conversion to YUV and back
    assert probe_video(two).frames == 26 and apart.max() <= 4 and (apart > 0).mean() < 1e-3
    sidecars = [json.loads(path.with_suffix(".json").read_text()) for path in (video_of_one, two)]
    assert [sidecar["processes"] for sidecar in sidecars] == [1, 2]
    assert sidecars[0]["fingerprint"] == sidecars[1]["fingerprint"]  # either can resume the other's job


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_that_fails_in_a_forward_ends_the_run(fault: str, command: list[str], tmp_path: Path) -> None:
    check_fault(fault, command, tmp_path)
