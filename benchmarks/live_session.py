"""A live session in real time with full-size random weights: delays, time of a block, memory, two at once.

    python -m benchmarks live_session [--config configs/livetalk.yaml] [--scale 1.3B] [--size 512x512]
        [--answers 12] [--talk 15] [--sessions 2] [--hp quantize=fp8 decoder=taehv]
    python -m benchmarks live_session --config configs/leaptalk.yaml --hp quantize=fp8   # or flashhead.yaml

One session first shows a silent face until its cache is full and its passes are captured. Then:
`first frame`: seconds from the start of a block, whose sound is there, to its first frames on the host.
`block`: seconds from the start of a block to its last frames.
`answer`: seconds from a push of 1.5 s of speech at a random time to the first chunk that speaks.
`talk`: seconds from the newest sound of a chunk to its frames, sound pushed in pieces of 20 ms at real time.
Then further sessions open and all talk; then all close. A session that stalled or dropped a frame is named in
the table. Prints the table, then one line of JSON.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.shared.inputs import CHUNKS_FIRST, RATE, faint_portrait, paint_faintly, speech
from benchmarks.shared.options import add_config, add_hp, make_parser, size_of
from benchmarks.shared.report import print_result, print_table
from benchmarks.shared.timing import quantile
from omniavatar import AvatarPipeline, LiveSession
from omniavatar.assets import PORTRAIT
from omniavatar.config.load import load_config
from omniavatar.live.chunk import LiveChunk
from omniavatar.live.maker import BlockMaker
from omniavatar.live.makers import maker_of, stage_of

PROMPT = "a person speaks"
ANSWER_S, PIECE_S = 1.5, 0.02


class Timed:
    """A maker whose blocks are timed. `times`: (seconds to the first frames, to the last ones)."""

    def __init__(self, maker: BlockMaker) -> None:
        self._maker = maker
        self.times: list[tuple[float, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._maker, name)

    def make(self, stop: Callable[[], bool]) -> Iterator[np.ndarray]:
        begun, first = time.perf_counter(), 0.0
        for piece in self._maker.make(stop):
            first = first or time.perf_counter() - begun
            yield piece
        self.times.append((first, time.perf_counter() - begun))


class Viewer:
    """A session with a thread that takes its chunks as they come."""

    def __init__(self, pipeline: AvatarPipeline, seed: int) -> None:
        self.maker: Timed | None = None
        self.chunks: list[tuple[float, LiveChunk]] = []

        def build() -> BlockMaker:
            config = pipeline.config
            image = faint_portrait() if config.video.color_match else PORTRAIT
            self.maker = Timed(maker_of(pipeline, image, PROMPT if config.family.text else "", seed))
            return self.maker

        self.session = LiveSession.on(stage_of(pipeline), build, RATE)
        self.session.__enter__()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        for chunk in self.session:
            self.chunks.append((time.monotonic(), chunk))

    @property
    def times(self) -> list[tuple[float, float]]:
        assert self.maker is not None
        return self.maker.times

    def wait_for_blocks(self, count: int) -> None:
        while len(self.times) < count:
            if not self._thread.is_alive():
                raise SystemExit("error: the session ended; its error is above")
            time.sleep(0.01)

    def answer(self, samples: np.ndarray) -> float:
        """Seconds until the first chunk that speaks, after `samples` were pushed at once."""
        seen, pushed = len(self.chunks), time.monotonic()
        self.session.push_audio(samples, RATE)
        self.session.end_speech()
        while True:
            for moment, chunk in self.chunks[seen:]:
                if chunk.speaking:
                    return moment - pushed
            time.sleep(0.002)

    def close(self) -> float:
        """Seconds until the session has freed what it had."""
        begun = time.monotonic()
        self.session.close().result()
        taken = time.monotonic() - begun
        self._thread.join()
        return taken


def talk(viewers: Sequence[Viewer], samples: np.ndarray, seconds: float) -> list[float]:
    """Push sound in real time to all; the delays of the first one's chunks."""
    seen, step = len(viewers[0].chunks), round(PIECE_S * RATE)
    begun = time.monotonic()
    for number in range(round(seconds / PIECE_S)):
        time.sleep(max(0.0, begun + (number + 1) * PIECE_S - time.monotonic()))
        for viewer in viewers:
            viewer.session.push_audio(
                np.take(samples, range(number * step, (number + 1) * step), mode="wrap"), RATE
            )
    for viewer in viewers:
        viewer.session.end_speech()
    time.sleep(2.0)
    return [chunk.delay for _, chunk in viewers[0].chunks[seen:] if chunk.delay is not None]


def held() -> int | None:
    """Bytes of live tensors on the GPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    add_config(parser, "configs/livetalk.yaml")
    parser.add_argument("--scale", default="1.3B")
    parser.add_argument("--size", type=size_of, default="512x512", help="height x width")
    parser.add_argument("--answers", type=int, default=12)
    parser.add_argument("--talk", type=float, default=15.0, help="seconds of sound pushed in real time")
    parser.add_argument("--sessions", type=int, default=2)
    add_hp(parser)
    options = parser.parse_args(arguments)
    size = list(options.size)
    values = ["weights=random", f"scale={options.scale}", f"image_sizes_720={[size]}"]
    config = load_config(options.config, [*values, *options.hp]).config
    paint_faintly()
    result = measure(config, options.answers, options.talk, options.sessions)
    rows = [
        [name, *(f"{figure:.3f}" for figure in summary.values())]
        for name, summary in result["seconds"].items()
    ]
    print_table(["seconds", "median", "least", "99 %", "most"], rows)
    print_result(
        "live_session", config=options.config, hp=options.hp, scale=options.scale, size=size, **result
    )


def measure(config: Any, answers: int, talk_s: float, sessions: int) -> dict[str, Any]:
    samples = speech(max(talk_s, ANSWER_S)).samples
    with AvatarPipeline.from_config(config) as pipeline:
        first = Viewer(pipeline, 0)
        opened = held()
        first.wait_for_blocks(blocks_first(config))
        warm, full = len(first.times), held()
        waits, pauses = [], random.Random(0)
        for _ in range(answers):
            waits.append(first.answer(samples[: round(ANSWER_S * RATE)]))
            time.sleep(ANSWER_S + pauses.uniform(0.5, 1.5))
        delays = talk([first], samples, talk_s)
        alone, stats, flat = list(first.times[warm:]), first.session.stats(), held()
        more = [Viewer(pipeline, number) for number in range(1, sessions)]
        together = talk([first, *more], samples, talk_s) if more else []
        shared = [viewer.session.stats() for viewer in (first, *more)]
        closing = [viewer.close() for viewer in (*more, first)]
        closed = held()
        again = Viewer(pipeline, 0)
        again.wait_for_blocks(warm)
        closing.append(again.close())
        closed_again = held()
        fps, attention = float(first.session.fps), pipeline.models.attention_name
    seconds = {
        "first frame": [each for each, _ in alone],
        "block": [each for _, each in alone],
        "answer": waits,
        "talk": delays,
        "talk, all sessions": together,
        "close": closing,
    }
    median = statistics.median(seconds["block"])
    return {
        "seconds": {name: summary(times) for name, times in seconds.items() if times},
        "blocks": len(alone),
        "period_s": stats.period_s,
        "frames_per_second": fps * stats.period_s / median,
        "p99_over_median": quantile(seconds["block"], 0.99) / median,
        "stalls": stats.stalls,
        "dropped": stats.dropped,
        "sessions": [[each.stalls, each.dropped, each.block_s] for each in shared],
        "attention": attention,
        "bytes": dict(opened=opened, full=full, later=flat, closed=closed, closed_again=closed_again),
    }


def blocks_first(config: Any) -> int:
    """Blocks until a session is as fast as it will be."""
    causal = config.sampling.causal
    if causal is not None:
        blocks: int = causal.slots + 2 * (causal.rolling + 1)
        return blocks
    return 3 if config.family.chunk is None else CHUNKS_FIRST


def summary(times: Sequence[float]) -> dict[str, float]:
    return dict(median=statistics.median(times), min=min(times), p99=quantile(times, 0.99), max=max(times))
