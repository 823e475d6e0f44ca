"""On CUDA, device memory does not grow with the number of requests."""

from __future__ import annotations

import io
import threading

import PIL.Image
import pytest
import torch

from engine import make_pipeline, portrait, request, voice

pytestmark = pytest.mark.gpu
REQUESTS, SETTLED = 100, 20
"""In the first requests, caches of kernels and shapes fill up."""


def test_a_hundred_requests_leave_device_memory_flat(nano_checkpoint, tmp_path) -> None:
    """Every prompt, picture and sound is another one; the lengths repeat, so that shapes do."""
    pipe = make_pipeline(nano_checkpoint, tmp_path, device="cuda", dtype="bf16", num_steps=1)
    held = []
    for number in range(REQUESTS):
        picture = io.BytesIO()
        PIL.Image.fromarray(portrait(number)).save(picture, "PNG")
        seconds = 0.3 + number % 5 / 10
        asked = request(
            prompt=f"person number {number}", image=picture.getvalue(), audio=voice(seconds, seed=number)
        )
        for _ in pipe.stream(asked):
            pass
        torch.cuda.synchronize()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    settled = held[SETTLED:]
    allocated, reserved = zip(*settled, strict=True)
    assert max(allocated[40:]) <= max(allocated[:40])
    assert max(reserved[40:]) <= max(reserved[:40])
    assert threading.active_count() < 20


def test_a_closed_pipeline_gives_its_device_memory_back(nano_checkpoint, tmp_path) -> None:
    """The first pipeline also leaves the workspaces of libraries, which stay."""
    held = []
    for _ in range(3):
        with make_pipeline(nano_checkpoint, tmp_path, device="cuda", dtype="bf16") as pipe:
            pipe.warm_up()
            assert len(list(pipe.stream(request(0.3))))
            during = torch.cuda.memory_allocated()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2] < during - 2**20
