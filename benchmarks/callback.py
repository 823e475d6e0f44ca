"""Seconds of a window without and with `callback_on_step_end`, with random weights.

    python -m benchmarks callback [--scale 1.3B] [--size 400x720] [--frames 41] [--steps 10] [--repeats 5]

The ways take turns. `looks`: the callback reads numbers of the host only. `no latents`: it gets no copy of
them. `reads`: it sums the latents, and so waits for the device in each step. One pass a step, so that the
steps are short and queueing ahead matters most. Every way must give the frames of the plain one.
Prints a table, then one line of JSON.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.shared.options import add_device, add_repeats, make_parser, size_of
from benchmarks.shared.report import print_result, print_table, spread
from benchmarks.shared.timing import synchronize
from omniavatar import AvatarPipeline, AvatarRequest
from omniavatar.config.load import load_config
from omniavatar.device import choose_device


def looks(pipe: Any, step: int, timestep: float, values: Mapping[str, Any]) -> None:
    assert values["window"] < values["windows"]


def reads(pipe: Any, step: int, timestep: float, values: Mapping[str, Any]) -> None:
    assert np.isfinite(float(values["latents"].sum()))


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "looks": {"callback_on_step_end": looks},
    "no latents": {"callback_on_step_end": looks, "callback_on_step_end_tensor_inputs": ()},
    "reads": {"callback_on_step_end": reads},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--scale", default="1.3B")
    parser.add_argument("--size", default="400x720", help="HEIGHTxWIDTH")
    parser.add_argument("--frames", type=int, default=41)
    parser.add_argument("--steps", type=int, default=10)
    add_repeats(parser)
    add_device(parser)
    options = parser.parse_args(arguments)
    height, width = size_of(options.size)
    settings = {
        "weights": "random",
        "scale": options.scale,
        "device": options.device,
        "num_steps": options.steps,
        "guidance_scale": 1.0,
        "overlap_frame": 5,
        "image_sizes_720": [[height, width]],
        "seq_len": options.frames,
        "max_tokens": ((options.frames - 1) // 4 + 1) * (height // 16) * (width // 16),
    }
    request = AvatarRequest("a person speaks", np.full((height, width, 3), 128, np.uint8))
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    with AvatarPipeline.from_config(load_config(None, settings).config) as pipe:
        for _ in range(2):  # loads and warms up
            _, wanted = timed(pipe, request, {})
        for _ in range(options.repeats):
            for name, way in WAYS.items():
                seconds, frames = timed(pipe, request, way)
                assert np.array_equal(frames, wanted), f"{name}: other frames than without a callback"
                times[name].append(seconds)
    plain = statistics.median(times["plain"])
    more = {name: 1e3 * (statistics.median(each) - plain) / options.steps for name, each in times.items()}
    print_table(
        ["callback", "s of a window", "ms more a step"],
        [
            [name, spread(statistics.median(each), min(each), max(each)), f"{more[name]:.2f}"]
            for name, each in times.items()
        ],
    )
    print_result(
        "callback",
        choose_device(options.device),
        scale=options.scale,
        size=options.size,
        frames=options.frames,
        steps=options.steps,
        repeats=options.repeats,
        equal_frames=True,
        seconds={name: [round(value, 4) for value in each] for name, each in times.items()},
        ms_more_a_step={name: round(value, 3) for name, value in more.items()},
    )


def timed(pipe: AvatarPipeline, request: AvatarRequest, way: Mapping[str, Any]) -> tuple[float, np.ndarray]:
    """Seconds until all frames of the request are on the host, and the frames."""
    synchronize()
    begun = time.perf_counter()
    frames = np.concatenate([chunk.frames for chunk in pipe.stream(request, **way)])
    synchronize()
    return time.perf_counter() - begun, frames
