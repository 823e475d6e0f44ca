"""Streamed blocks, placement and fallback on CUDA, with real streams and a real limit."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from engine import SIDE, request
from omniavatar import AvatarPipeline
from omniavatar.accel.apply import AccelConfig, apply_accelerations, weight_form
from omniavatar.accel.attention.registry import create_attention
from omniavatar.accel.kernels.fused import create_fused
from omniavatar.accel.offload import OffloadConfig, Offloader, StreamCopies, StreamedBlock, apply_offload
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec, text_tensors
from omniavatar.config.load import load_config
from omniavatar.encoders.text import random_text_encoder, sizes_of
from omniavatar.engine.events import Message
from omniavatar.engine.host import Host
from omniavatar.engine.recorder import RunRecorder
from omniavatar.plan.limit import device_limit
from omniavatar.plan.sizes import GB, denoise_bytes, dit_sizes, held_bytes

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
VARIANTS = [AccelConfig(), AccelConfig(fuse=True), AccelConfig("fp8", True)]
LATE = 20_000_000
"""Clock cycles that delay a stream by about 10 ms, much longer than a copy or a block in these tests."""


@pytest.fixture(autouse=True)
def limit_lifted():
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


def model(variant: AccelConfig, scale="nano", place=None, **sizes):
    _, attention = create_attention("cudnn", CUDA, torch.bfloat16)
    config, ops = replace(scale_spec(scale).dit, **sizes), create_fused(CUDA)
    dit = random_dit(
        config,
        attention=attention,
        dtype=torch.bfloat16,
        device=CUDA,
        seed=0,
        form=weight_form(variant, ops, CUDA),
        device_of=place,
    )
    apply_accelerations(dit, variant, ops)
    return dit


def wide(variant: AccelConfig):
    return model(variant, dim=1024, num_heads=8, ffn_dim=4096, num_layers=8)


def inputs(dit, grid=(5, 24, 32)):
    generator = torch.Generator(CUDA).manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=CUDA)

    text = dit.prepare_text(random(1, 512, dit.config.text_dim))
    audio = dit.prepare_audio(random(1, 4 * grid[0] - 3, dit.config.audio_dim))
    return random(1, 16, *grid), random(1, 17, *grid), torch.tensor([700.0], device=CUDA), text, audio


class LateStreams(StreamCopies):
    """Delays the start of copies or the end of computations; results must not depend on it."""

    def __init__(self, late: str) -> None:
        super().__init__(CUDA)
        self.late = late

    def copy(self, slot, host) -> None:
        if self.late == "copy":
            with torch.cuda.stream(self._stream):
                torch.cuda._sleep(LATE)
        super().copy(slot, host)

    def wait(self, slot) -> None:
        super().wait(slot)
        if self.late == "computation":
            torch.cuda._sleep(LATE)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("resident", "ring"), [(0, 1), (0, 2), (3, 2), (5, 3), (8, 2)])
@torch.inference_mode()
def test_streamed_equals_resident(variant, resident, ring):
    dit = wide(variant)
    args = inputs(dit)
    expected = dit(*args)
    apply_offload(dit, OffloadConfig(resident, ring), CUDA)
    assert sum(isinstance(block, StreamedBlock) for block in dit.blocks) == 8 - resident
    outputs = [dit(*args) for _ in range(4)]  # queued without a wait between them
    assert all(torch.equal(out, expected) for out in outputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs(dit)[3][0], args[3][0], strict=True))


@pytest.mark.parametrize("late", ["copy", "computation"])
@pytest.mark.parametrize("ring", [1, 2, 3])
@torch.inference_mode()
def test_late_streams_are_waited_for(late, ring):
    dit = wide(AccelConfig(fuse=True))
    args = inputs(dit)
    expected = dit(*args)
    apply_offload(dit, OffloadConfig(1, ring), CUDA, LateStreams(late))
    outputs = [dit(*args) for _ in range(2)]
    assert all(torch.equal(out, expected) for out in outputs)


@torch.inference_mode()
def test_more_blocks_go_later_and_leave_the_device():
    dit = wide(AccelConfig("fp8", True))
    args = inputs(dit)
    expected = dit(*args)
    offloader = Offloader(dit, CUDA)
    held = []
    for resident in (8, 5, 2, 0):
        offloader.apply(OffloadConfig(resident))
        assert torch.equal(dit(*args), expected)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[0] > held[1] > held[2] > held[3]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_weights_made_for_streaming_are_the_same(variant):
    """Streamed blocks move to host memory while the model is made; its weights do not change."""

    def home(key: str) -> torch.device:
        return torch.device("cpu") if key.startswith(("blocks.1.", "blocks.4.")) else CUDA

    resident, spread = model(variant), model(variant, place=home)
    assert {p.device.type for p in spread.blocks[4].parameters()} == {"cpu"}
    expected = resident.state_dict()
    assert all(torch.equal(value.cuda(), expected[key]) for key, value in spread.state_dict().items())


def test_text_encoder_layer_by_layer():
    sizes = sizes_of(dict(text_tensors(scale_spec("nano").text)), "nano")
    whole, streamed = (
        random_text_encoder(CUDA, torch.bfloat16, seed=3, sizes=sizes, layer_by_layer=each)
        for each in (False, True)
    )
    assert next(streamed.stack.block.parameters()).device.type == "cpu"
    embeddings = streamed.encode(["a person speaks", "another one"])
    assert embeddings.device.type == "cuda"
    assert torch.equal(embeddings, whole.encode(["a person speaks", "another one"]))


@pytest.mark.parametrize("variant", [AccelConfig(fuse=True), AccelConfig("fp8", True)], ids=str)
@torch.inference_mode()
def test_estimate_covers_a_forward_and_is_not_far_off(variant):
    float8 = variant.quantize == "fp8"
    dit = model(variant, "1.3B")
    args = inputs(dit, (14, 50, 90))
    dit(*args)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    dit(*args)
    alive = torch.cuda.max_memory_allocated() - before
    config = dit.config
    estimate = denoise_bytes(config, 15750, 2, True, 1, False, float8)
    assert 0.75 * estimate <= alive <= estimate
    weights = sum(t.numel() * t.itemsize for t in dit.state_dict().values())
    assert weights == dit_sizes(config, 2, float8).whole
    assert sum(t.numel() * 2 for pair in args[3] for t in pair) == held_bytes(config, 1, 2)


def pipeline(host=None, **changes):
    """The 1.3B with random weights, small frames and given text embeddings."""
    values = {
        "weights": "random",
        "scale": "1.3B",
        "device": "cuda",
        "num_steps": 2,
        "guidance_scale": 2.0,
        "image_sizes_720": [[SIDE * 2, SIDE * 2]],
        "max_tokens": 800,
        "overlap_frame": 5,
        "seq_len": 60,
        "preset": "ultrafast",
        **changes,
    }
    messages: list[str] = []
    recorder = RunRecorder([lambda event: isinstance(event, Message) and messages.append(event.text)])
    pipe = AvatarPipeline.from_config(load_config(None, values).config, recorder=recorder, host=host)
    generator = torch.Generator().manual_seed(5)
    for prompt in (request().prompt, pipe.config.sampling.negative_prompt):
        embedding = torch.randn(1, 512, 4096, generator=generator)
        pipe.models.prompts.remember(prompt, embedding.to(torch.bfloat16))
    return pipe, messages


class WholeCard(Host):
    """A machine that does not see that another limit was set for this process."""

    def memory_limit(self, runtime, device):
        return torch.cuda.get_device_properties(device).total_memory


def streamed(pipe) -> int:
    return sum(isinstance(block, StreamedBlock) for block in pipe.models.dit.blocks)


def test_videos_under_a_number_and_after_failed_allocations_are_the_same(tmp_path):
    pipe, _ = pipeline()
    torch.cuda.reset_peak_memory_stats()
    pipe.generate(request(None), tmp_path / "whole.mp4")
    peak = torch.cuda.max_memory_allocated()
    assert streamed(pipe) == 0
    del pipe
    gc.collect()
    torch.cuda.empty_cache()

    pipe, messages = pipeline(memory=round(0.75 * peak / GB, 2))
    torch.cuda.reset_peak_memory_stats()
    pipe.generate(request(None), tmp_path / "number.mp4")
    assert streamed(pipe) > 0 and torch.cuda.max_memory_allocated() <= 0.75 * peak
    assert any("stream from host memory" in text for text in messages)
    assert (tmp_path / "number.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    del pipe
    gc.collect()
    torch.cuda.empty_cache()

    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction(0.75 * peak / total)
    pipe, messages = pipeline(WholeCard())
    pipe.generate(request(None), tmp_path / "fallback.mp4")
    assert streamed(pipe) > 0 and any("retrying with less GPU memory" in text for text in messages)
    assert (tmp_path / "fallback.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_auto_sees_a_limit_set_from_outside():
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction(3 * GB / total)
    assert abs(device_limit("auto", CUDA) - 3 * GB) < 1000
