"""Runs under a memory limit: the same video to the byte, their messages, and failed allocations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine import adopt_placement, make_pipeline, request
from omniavatar.accel.offload import Offloader, StreamedBlock, streamed_blocks
from omniavatar.accel.vae import FastVAE
from omniavatar.checkpoint.layout import SCALES
from omniavatar.config.load import load_config
from omniavatar.config.schema import PipelineConfig
from omniavatar.device import choose_device
from omniavatar.engine.events import Message, StepFinished
from omniavatar.engine.host import Host
from omniavatar.engine.loading import loading_device
from omniavatar.engine.recorder import RunRecorder
from omniavatar.errors import ConfigError, ResourceError, ResumeError
from omniavatar.plan import placement
from omniavatar.plan.limit import device_limit, enforce_limit
from omniavatar.plan.placement import place
from omniavatar.plan.run import window_shape
from omniavatar.plan.sizes import GB

CPU = torch.device("cpu")
SECONDS = 0.9
TIGHT = 0.04
"""GB in which some of the nano model's blocks have to be streamed."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("text-cache")


@pytest.fixture(scope="module")
def whole(nano_checkpoint, cache, tmp_path_factory):
    """The video made with everything on the device."""
    output = tmp_path_factory.mktemp("whole") / "out.mp4"
    make_pipeline(nano_checkpoint, cache).generate(request(SECONDS), output)
    return output


class Messages:
    def __init__(self) -> None:
        self.texts: list[str] = []
        self.recorder = RunRecorder([self])

    def __call__(self, event) -> None:
        if isinstance(event, Message):
            self.texts.append(event.text)

    def about_memory(self) -> list[str]:
        return [text for text in self.texts if "memory:" in text]


def streamed(pipe) -> int:
    return sum(isinstance(block, StreamedBlock) for block in pipe.models.dit.blocks)


def sidecar(output: Path) -> dict:
    return json.loads(output.with_suffix(".json").read_text())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"memory": TIGHT}, range(1, 6)),
        ({"num_persistent_param_in_dit": 0}, [6]),
        ({"num_persistent_param_in_dit": 3_000_000}, [3, 4]),
        ({"num_persistent_param_in_dit": 10**9}, [0]),
    ],
    ids=str,
)
def test_streamed_video_is_the_same_to_the_byte(nano_checkpoint, cache, whole, tmp_path, change, expected):
    messages = Messages()
    pipe = make_pipeline(nano_checkpoint, cache, messages.recorder, **change)
    pipe.generate(request(SECONDS), tmp_path / "out.mp4")
    assert streamed(pipe) in expected
    assert (tmp_path / "out.mp4").read_bytes() == whole.read_bytes()
    record, whole_record = sidecar(tmp_path / "out.mp4"), sidecar(whole)
    assert record["memory"]["resident_blocks"] == 6 - streamed(pipe)
    assert record["fingerprint"] == whole_record["fingerprint"]
    assert len(messages.about_memory()) == 1
    assert (f"{6 - streamed(pipe)} of 6 blocks" in messages.about_memory()[0]) == (streamed(pipe) > 0)


def test_weights_of_streamed_blocks_go_to_host_memory_as_they_are_read():
    """Checks the function that chooses the device of a tensor."""
    device_of = loading_device(6, 2, torch.device("meta"))
    names = [f"blocks.{i}.{name}" for i in range(6) for name in ("ffn.0.weight", "modulation")]
    on_host = [key for key in names if device_of(key).type == "cpu"]
    assert on_host == [
        f"blocks.{i}.{n}" for i in streamed_blocks(6, 2) for n in ("ffn.0.weight", "modulation")
    ]
    assert len(on_host) == 8
    for key in ("head.head.weight", "audio_proj.proj.bias", "block.0.x"):
        assert device_of(key).type == "meta"


def test_streamed_blocks_of_a_pipeline_are_those_of_the_plan(nano_checkpoint, cache):
    pipe = make_pipeline(nano_checkpoint, cache, num_persistent_param_in_dit=3_000_000)
    next(iter(pipe.stream(request(0.2))))
    resident = pipe.models.residency.placement.memory.resident_blocks
    streaming = [i for i, block in enumerate(pipe.models.dit.blocks) if isinstance(block, StreamedBlock)]
    assert streaming == sorted(streamed_blocks(6, resident)) and 0 < len(streaming) < 6


class Limited(Host):
    """A host whose device has `limit` bytes; None means no limit."""

    def __init__(self, limit: float | None) -> None:
        self.limit = limit

    def memory_limit(self, runtime, device):
        return None if self.limit is None else int(self.limit)


def failing(function, calls: list[int], at: set[int]):
    """`function`, but calls whose numbers are in `at` run out of memory."""

    def run(*args, **options):
        calls.append(len(calls))
        if calls[-1] in at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return function(*args, **options)

    return run


@pytest.mark.parametrize("where", ["denoise", "decode", "encode"])
def test_a_window_that_ran_out_of_memory_is_retried(nano_checkpoint, cache, whole, tmp_path, where):
    messages = Messages()
    pipe = make_pipeline(nano_checkpoint, cache, messages.recorder)
    calls: list[int] = []
    models = pipe.models
    if where == "denoise":
        adopt_placement(pipe, request(SECONDS))
        models.dit.attention = failing(models.dit.attention, calls, {60, 61})
    else:
        name = "decode_stream" if where == "decode" else "encode"
        setattr(models.vae, name, failing(getattr(models.vae, name), calls, {1, 2}))
    pipe.generate(request(SECONDS), tmp_path / "out.mp4")
    assert (tmp_path / "out.mp4").read_bytes() == whole.read_bytes()
    retries = [text for text in messages.texts if "retrying with less GPU memory" in text]
    assert len(retries) == 2 and "Tried to allocate" not in retries[0] and "CUDA out of memory" in retries[0]
    assert streamed(pipe) == 4  # two steps down: first three blocks, because two fill the ring, then one
    assert sidecar(tmp_path / "out.mp4")["memory"]["resident_blocks"] == 2


def test_out_of_memory_while_loading_is_retried(nano_checkpoint, cache, whole, tmp_path):
    pipe = make_pipeline(nano_checkpoint, cache)
    calls: list[int] = []
    pipe.models.residency.hold = failing(pipe.models.residency.hold, calls, {0})
    pipe.generate(request(SECONDS), tmp_path / "out.mp4")
    assert len(calls) == 2 and streamed(pipe) == 3
    assert (tmp_path / "out.mp4").read_bytes() == whole.read_bytes()


def test_out_of_memory_while_stepping_down_takes_the_next_step(
    nano_checkpoint, cache, whole, tmp_path, monkeypatch
):
    """The ring's buffers are allocated too; if that fails, the next step down is taken."""
    pipe = make_pipeline(nano_checkpoint, cache)
    attached, failed = [], []
    monkeypatch.setattr(Offloader, "attach_ring", failing(Offloader.attach_ring, attached, {0, 1}))
    adopt_placement(pipe, request(SECONDS))
    pipe.models.dit.attention = failing(pipe.models.dit.attention, failed, {30})
    pipe.generate(request(SECONDS), tmp_path / "out.mp4")
    assert len(attached) == 3 and streamed(pipe) == 5
    assert (tmp_path / "out.mp4").read_bytes() == whole.read_bytes()


def test_text_encoder_that_does_not_fit_computes_layer_by_layer(nano_checkpoint, whole, tmp_path):
    messages = Messages()
    pipe = make_pipeline(nano_checkpoint, tmp_path / "cache", messages.recorder)
    calls: list[int] = []
    pipe.models.prompts.encode = failing(pipe.models.prompts.encode, calls, {0})
    pipe.generate(request(SECONDS), tmp_path / "out.mp4")
    assert len(calls) == 2 and any("layer by layer" in text for text in messages.texts)
    assert (tmp_path / "out.mp4").read_bytes() == whole.read_bytes()


def test_running_out_of_steps_is_one_clear_error(nano_checkpoint, cache, tmp_path):
    pipe = make_pipeline(nano_checkpoint, cache)
    calls: list[int] = []
    adopt_placement(pipe, request(SECONDS))
    pipe.models.dit.attention = failing(pipe.models.dit.attention, calls, set(range(1000)))
    with pytest.raises(ResourceError, match=r"max_tokens: 56 needs more GPU memory than is free .*fp8"):
        pipe.generate(request(SECONDS), tmp_path / "out.mp4")
    assert streamed(pipe) == 6 and len(calls) == 7  # no change, six blocks, smaller VAE passes


def test_a_limit_that_is_too_small_is_an_error_before_anything_is_loaded(nano_checkpoint, cache, tmp_path):
    pipe = make_pipeline(nano_checkpoint, cache, memory=0.001)
    with pytest.raises(ResourceError, match=r"memory: about 0\.0 GB are needed .*, 0\.0 GB are available"):
        pipe.generate(request(SECONDS), tmp_path / "out.mp4")
    assert "dit" not in vars(pipe.models) and not list(tmp_path.iterdir())


def test_later_requests_keep_streamed_blocks_and_may_stream_more(nano_checkpoint, cache, tmp_path, whole):
    host = Limited(None)
    pipe = make_pipeline(nano_checkpoint, cache, host=host)
    pipe.generate(request(SECONDS), tmp_path / "a.mp4")
    assert streamed(pipe) == 0
    host.limit = TIGHT * GB
    pipe.generate(request(SECONDS), tmp_path / "b.mp4")
    tight = streamed(pipe)
    host.limit = 80 * GB
    pipe.generate(request(SECONDS), tmp_path / "c.mp4")
    assert 0 < tight == streamed(pipe)
    for name in "abc":
        assert (tmp_path / f"{name}.mp4").read_bytes() == whole.read_bytes()


def settings(**changes) -> PipelineConfig:
    return load_config(None, {"weights": "random", "scale": "14B", **changes}).config


def placed(limit_gb: float | None, kept=None, **changes):
    config = settings(fuse=True, **changes)
    dit = SCALES[-1].dit
    shape = window_shape(config, (400, 720), has_audio=True)
    limit = None if limit_gb is None else int(limit_gb * GB)
    return place(config, dit, shape, "fast", CPU, limit, kept)


@pytest.fixture
def with_float8(monkeypatch):
    monkeypatch.setattr(placement, "best_quantize", lambda device: "fp8")


def test_auto_quantises_only_what_would_be_streamed(with_float8):
    assert placed(80, quantize="auto").quantize == "none"
    tight = placed(30, quantize="auto")
    assert tight.quantize == "fp8" and not tight.memory.streams
    assert "fp8 layers (quantize=auto" in tight.describe()
    assert placed(8, quantize="auto").quantize == "fp8"
    assert placed(30).quantize == "none" and placed(80, quantize="fp8").quantize == "fp8"


def test_exact_weights_that_are_streamed_come_with_a_hint(with_float8):
    assert "quantize=fp8 would keep 40 of 40, at some loss of quality" in placed(30).describe()
    assert "quantize" not in placed(80).describe()


def test_auto_stays_exact_where_float8_is_missing():
    assert placed(30, quantize="auto").quantize == "none"


def test_precision_and_passes_belong_to_the_identity_and_are_kept(with_float8):
    small = placed(6.3, quantize="fp8")
    assert small.memory.coding_pass == 1
    assert small.identity() == {"runtime.quantize": "fp8", "runtime.vae_latents_a_pass": 1}
    kept = placed(80, kept=small.identity(), quantize="auto")
    assert kept.identity() == small.identity()
    assert placed(80, kept={"runtime.quantize": "none"}, quantize="auto").quantize == "none"
    assert placed(30, kept={"runtime.quantize": "none"}, quantize="auto").memory.streams
    assert placed(80, kept={"runtime.quantize": "fp8"}, quantize="none").quantize == "none"


def test_num_persistent_param_decides_the_resident_blocks():
    assert placed(80, num_persistent_param_in_dit=100_000_000).memory.resident_blocks == 0
    assert placed(80, num_persistent_param_in_dit=7_000_000_000).memory.resident_blocks == 19
    assert placed(None, num_persistent_param_in_dit=20_000_000_000).memory.resident_blocks == 40


def test_limit_of_a_device(monkeypatch):
    assert device_limit("auto", CPU) is None and device_limit(10, CPU) == 10 * GB
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GB, 24 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GB)
    fraction = [1.0]
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction[0])
    assert device_limit("auto", cuda) == 22.5 * GB  # free and held memory, less the margin
    assert device_limit(10, cuda) == 10 * GB and device_limit(23, cuda) == 22.5 * GB
    fraction[0] = 0.25
    assert device_limit("auto", cuda) == device_limit(10, cuda) == 6 * GB


def test_too_little_host_memory_for_streamed_blocks_is_an_error():
    from omniavatar.accel import pinned

    need = placed(10).streamed_bytes
    assert 20 * GB < need < 28.2 * GB and placed(80).streamed_bytes == 0
    with pytest.raises(ResourceError, match=r"host memory for streamed weights .*quantize=fp8"):
        pinned.check_host_room(need, lambda: (16 * GB, 32 * GB))
    pinned.check_host_room(0, lambda: (16 * GB, 32 * GB))


def test_a_number_limits_the_allocator_and_auto_does_not(monkeypatch):
    set_to: list[float] = []
    properties = type("Properties", (), {"total_memory": 40 * GB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: set_to.append(fraction)
    )
    for memory in ("auto", 10, 100):
        enforce_limit(memory, torch.device("cuda"))
    enforce_limit(10, CPU)
    assert set_to == [0.25, 1.0]


def test_resumed_run_keeps_the_precision_it_started_with(nano_checkpoint, cache, tmp_path, monkeypatch):
    """Started with little memory (float8), resumed with enough: same precision, same video."""
    monkeypatch.setattr(placement, "best_quantize", lambda device: "fp8")
    tight = Limited(TIGHT * GB)
    expected = tmp_path / "whole.mp4"
    make_pipeline(nano_checkpoint, cache, host=tight, quantize="auto").generate(request(SECONDS), expected)
    assert sidecar(expected)["quantize"] == "fp8"

    def stop(event):
        if isinstance(event, StepFinished) and event.window == 2:
            raise KeyboardInterrupt

    output = tmp_path / "out.mp4"
    pipe = make_pipeline(nano_checkpoint, cache, RunRecorder([stop]), tight, quantize="auto")
    with pytest.raises(KeyboardInterrupt):
        pipe.generate(request(SECONDS), output)
    exact = make_pipeline(nano_checkpoint, cache, quantize="none")
    with pytest.raises(ResumeError, match=r'runtime.quantize: "fp8" -> "none"'):
        exact.generate(request(SECONDS), output)
    result = make_pipeline(nano_checkpoint, cache, quantize="auto").generate(request(SECONDS), output)
    assert result.resumed_windows and output.read_bytes() == expected.read_bytes()


def test_the_last_step_down_changes_the_vaes_passes_and_is_recorded(nano_checkpoint, cache, tmp_path):
    messages = Messages()
    pipe = make_pipeline(nano_checkpoint, cache, messages.recorder, vae="fast")
    vae = pipe.models.vae
    assert isinstance(vae, FastVAE)
    calls: list[int] = []
    sizes: list[int] = []
    decode = vae.decode_stream

    def decode_stream(latent):
        calls.append(len(calls))
        if len(calls) < 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(vae.config.latents_at_once)
        return decode(latent)

    vae.decode_stream = decode_stream
    pipe.generate(request(SECONDS), tmp_path / "out.mp4")
    assert set(sizes) == {1} and vae.config.frames_at_once == 4
    record = sidecar(tmp_path / "out.mp4")
    assert record["fingerprint"]["runtime.vae_latents_a_pass"] == "1"
    assert "VAE in small passes" in messages.about_memory()[-1]


def test_auto_precision_cannot_be_converted(tmp_path):
    from omniavatar.engine.convert import convert_checkpoint

    config = load_config(None, {"weights": "random", "scale": "nano", "quantize": "auto"}).config
    with pytest.raises(ConfigError, match="quantize: auto depends on the machine"):
        convert_checkpoint(config, tmp_path / "x.safetensors")


def test_a_cuda_device_has_an_index(monkeypatch):
    """Some functions of torch need a device with an index."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cuda:0") == torch.device("cuda", 0)


def test_best_precision_of_a_card(monkeypatch):
    from omniavatar.accel.precision import best_quantize, check_quantize

    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    for capability, best in (((9, 0), "fp8"), ((8, 9), "fp8"), ((8, 6), "int8"), ((7, 5), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert best_quantize(card) == best
    with pytest.raises(
        ResourceError, match=r"a card has no int8 products.*capability 8\.0\); use one of: auto, none$"
    ):
        check_quantize("int8", card)
    with pytest.raises(
        ResourceError, match=r"a card has no fp8 products.*capability 8\.9\); use one of: auto, none$"
    ):
        check_quantize("fp8", card)
    assert best_quantize(CPU) is None
