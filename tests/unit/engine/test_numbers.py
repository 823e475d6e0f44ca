"""Windows whose numbers are not finite: they end the run, and nothing of them is kept."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch

from engine import make_pipeline, overrides, request
from omniavatar import AvatarPipeline, NumbersError
from omniavatar.config.load import load_config
from omniavatar.engine.events import WindowStarted
from omniavatar.engine.handover import load_given
from omniavatar.engine.numbers import WindowNumbers, largest, remedy
from omniavatar.engine.recorder import RunRecorder
from omniavatar.errors import ResumeError

CUDA = torch.device("cuda")
"""Only its name is used: results on such a device are read later."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_among_many_is_found(dtype: torch.dtype, bad: float) -> None:
    values = torch.linspace(-3, 3, 1000).to(dtype).view(1, 10, 100)
    assert largest(values) == 3
    values[0, 7, 31] = bad
    assert not torch.isfinite(largest(values))


def test_the_largest_finite_numbers_are_finite() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = torch.full((4096,), torch.finfo(dtype).max, dtype=dtype)
        assert torch.isfinite(largest(values))


def test_results_of_a_device_are_read_at_the_end_and_name_the_first_bad_part() -> None:
    numbers = WindowNumbers("window 2 of 5", "try: dtype=bf16", CUDA)
    for name, value in (("latents", 1.0), ("pixels", math.nan), ("given latents", math.inf)):
        numbers.add(name, torch.full((3,), value))
    numbers.send()
    with pytest.raises(NumbersError, match=r"window 2 of 5: the pixels hold .*not finite.*try: dtype=bf16"):
        numbers.check()


def test_what_to_try_names_what_the_run_uses(tmp_path: Path) -> None:
    def tries(attention: str, quantize: str, **changes: object) -> str:
        values = {**overrides(tmp_path, tmp_path), **changes}
        return remedy(load_config(None, values).config, attention, quantize)

    assert tries("sdpa", "none") == "check that the weight files are whole and belong together"
    loras = [{"path": str(tmp_path / "style.safetensors")}]
    text = tries("sage", "fp8", dtype="fp16", loras=loras, step_cache="magcache", magcache_thresh=0.1)
    for part in ("dtype=bf16 instead of fp16", "style.safetensors", "quantize=none", "attention=sdpa"):
        assert part in text
    assert "step_cache=none" in text


PARTS: dict[str, Callable[[AvatarPipeline], torch.Tensor]] = {
    "latents": lambda pipe: pipe.models.dit.head.head.bias,
    "pixels": lambda pipe: pipe.models.vae.conv2.bias,
    "given latents": lambda pipe: pipe.models.vae.conv1.bias,
}
"""A weight on the way to each part, and not on the way to those before it."""


class BreaksAtWindow:
    """A listener that makes a weight of `part` NaN when the second window starts."""

    def __init__(self) -> None:
        self.pipe: AvatarPipeline | None = None
        self.part = ""

    def __call__(self, event: object) -> None:
        if isinstance(event, WindowStarted) and event.window == 1 and self.part:
            with torch.inference_mode():
                self.weight[0] = math.nan

    @property
    def weight(self) -> torch.Tensor:
        assert self.pipe is not None
        return PARTS[self.part](self.pipe)

    @contextmanager
    def breaking(self, part: str) -> Iterator[None]:
        self.part = part
        before = self.weight.detach().clone()
        try:
            yield
        finally:
            with torch.inference_mode():
                self.weight.copy_(before)
            self.part = ""


@pytest.fixture(scope="module")
def breaking(nano_checkpoint, tmp_path_factory) -> tuple[AvatarPipeline, BreaksAtWindow]:
    listener = BreaksAtWindow()
    folder = tmp_path_factory.mktemp("cache")
    listener.pipe = make_pipeline(nano_checkpoint, folder, RunRecorder([listener]), vae="plain")
    return listener.pipe, listener


@pytest.fixture(scope="module")
def whole(breaking, tmp_path_factory) -> bytes:
    """The video that no window spoils."""
    return breaking[0].generate(request(0.7), tmp_path_factory.mktemp("whole") / "x.mp4").output.read_bytes()


@pytest.mark.parametrize("part", PARTS)
def test_a_window_that_is_not_finite_ends_the_run_and_the_next_run_continues(
    breaking, whole, part, tmp_path
) -> None:
    pipe, listener = breaking
    output = tmp_path / "x.mp4"
    with listener.breaking(part), pytest.raises(NumbersError) as error:
        pipe.generate(request(0.7), output)
    assert re.match(rf"window 2 of 3: the {part}.*not finite.*weight files", str(error.value))
    assert error.value.exit_code == 8
    job = tmp_path / "x.mp4.job"
    assert json.loads((job / "job.json").read_text())["done"] == 1
    assert [path.name for path in sorted(job.glob("segment*"))] == ["segment_00000.mp4"]
    assert not output.exists()
    result = pipe.generate(request(0.7), output)
    assert result.resumed_windows == 1 and output.read_bytes() == whole


def test_frames_that_are_not_finite_are_not_streamed(breaking) -> None:
    pipe, listener = breaking
    shown = []
    with listener.breaking("pixels"), pytest.raises(NumbersError, match="window 2 of 3"):
        shown.extend(chunk.window for chunk in pipe.stream(request(0.7)))
    assert shown == [0]


def _written(path: Path, **tensors: torch.Tensor) -> None:
    path.write_bytes(safetensors.torch.save(tensors))


GOOD = torch.linspace(-2, 2, 64).reshape(1, 4, 1, 4, 4)
DAMAGE: dict[str, Callable[[Path], object]] = {
    "is missing": lambda path: path.unlink(),
    "holds numbers that are not finite": lambda path: _written(path, given=GOOD / 0),
    "of shape": lambda path: _written(path, given=GOOD[:, :3].contiguous()),
    "holds float16 latents": lambda path: _written(path, given=GOOD.half()),
    "no tensor `given`": lambda path: _written(path, other=GOOD),
    "is damaged": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "damaged": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("text", DAMAGE)
def test_a_hand_over_file_is_checked(text: str, tmp_path: Path) -> None:
    path = tmp_path / "given_00001.safetensors"
    _written(path, given=GOOD)
    assert torch.equal(load_given(path, GOOD.shape), GOOD)
    DAMAGE[text](path)
    with pytest.raises(ResumeError, match=f"given_00001.*{text}.*--no-resume") as error:
        load_given(path, GOOD.shape)
    assert "\n" not in str(error.value)
