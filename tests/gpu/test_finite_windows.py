"""On CUDA, a window whose numbers overflow ends the run in that window, and its predecessors are kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from engine import make_pipeline
from engine import request as speech
from omniavatar import AvatarPipeline, NumbersError
from omniavatar.engine.events import WindowStarted
from omniavatar.engine.numbers import WindowNumbers, largest
from omniavatar.engine.recorder import RunRecorder

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
PIXELS = (1, 3, 4, 400, 720)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1_234_567, -1])
def test_one_number_among_millions_is_found(dtype: torch.dtype, bad: float, place: int) -> None:
    values = torch.rand(PIXELS, device=CUDA).to(dtype)
    assert torch.isfinite(largest(values))
    values.view(-1)[place] = bad
    assert not torch.isfinite(largest(values))
    assert torch.isfinite(largest(torch.full(PIXELS, torch.finfo(dtype).max, dtype=dtype, device=CUDA)))


def test_the_check_takes_no_memory_and_does_not_wait() -> None:
    values = torch.rand(PIXELS, device=CUDA)
    numbers = WindowNumbers("window 1 of 1", "", CUDA)
    numbers.add("pixels", values)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        numbers.add("pixels", values)
        numbers.send()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < values.nbytes / 100
    torch.cuda.synchronize()
    numbers.check()


class Overflows:
    """A listener that makes a weight too large for fp16 when the second window starts."""

    def __init__(self) -> None:
        self.pipe: AvatarPipeline | None = None
        self.on = False

    @property
    def weight(self) -> torch.Tensor:
        assert self.pipe is not None
        return self.pipe.models.dit.get_submodule("blocks.0.ffn.2").weight  # in the precision of the model

    def __call__(self, event: object) -> None:
        if self.on and isinstance(event, WindowStarted) and event.window == 1:
            with torch.inference_mode():
                self.weight.fill_(60000.0)


def test_a_weight_that_overflows_in_fp16_ends_the_run_in_its_window(nano_checkpoint, tmp_path: Path) -> None:
    overflows = Overflows()
    pipe = overflows.pipe = make_pipeline(
        nano_checkpoint, tmp_path / "cache", RunRecorder([overflows]), device="cuda", dtype="fp16"
    )
    whole = pipe.generate(speech(1.2), tmp_path / "whole.mp4").output.read_bytes()
    kept = overflows.weight.detach().clone()
    overflows.on = True
    with pytest.raises(NumbersError, match=r"window 2 of \d+: the latents.*dtype=bf16 instead of fp16"):
        pipe.generate(speech(1.2), tmp_path / "x.mp4")
    overflows.on = False
    assert json.loads((tmp_path / "x.mp4.job" / "job.json").read_text())["done"] == 1
    assert not (tmp_path / "x.mp4").exists()
    with torch.inference_mode():
        overflows.weight.copy_(kept)
    result = pipe.generate(speech(1.2), tmp_path / "x.mp4")
    assert result.resumed_windows == 1 and result.output.read_bytes() == whole
