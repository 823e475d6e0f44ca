"""Which tips of the speed guide save time, by the measured parts of a window.

Every tip is one change of the configuration. The time of a video of five minutes is projected before and
after it from the same measured parts (a shorter window is measured too). What a change does to the picture is
not measured here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from omniavatar.config.change import changed
from omniavatar.config.schema import PipelineConfig
from omniavatar.errors import ConfigError

NOTHING = 0.005
PERSISTENT = 100_000_000
"""Parameters that the guide's fast configuration leaves on the device."""
CAUSAL_TIPS = ("few persistent parameters",)
"""The tips that a block-causal model can follow."""
DISTILLED = MappingProxyType(
    {"timesteps": (1000.0, 937.5, 833.3333, 625.0), "guidance_scale": 1.0, "audio_scale": None}
)


@dataclass(frozen=True)
class Tip:
    """One tip. before, after: seconds for the video; None where it cannot be tried, `note` says why."""

    tip: str
    change: str
    before: float | None
    after: float | None
    note: str = ""

    @property
    def verdict(self) -> str:
        """What the tip saves, or that it was not tried."""
        if self.before is None or self.after is None:
            return "not tried"
        saved = 1 - self.after / self.before
        if abs(saved) < NOTHING:
            return "saves nothing"
        return f"saves {saved:.0%}" if saved > 0 else f"costs {-saved:.0%} more"

    def as_dict(self) -> dict[str, Any]:
        """The tip for JSON."""
        return {**vars(self), "verdict": self.verdict}


def guide_tips(
    config: PipelineConfig,
    seconds: Callable[[PipelineConfig], float],
    cached: bool = True,
    persistent: int = PERSISTENT,
) -> list[Tip]:
    """The tips, tried on `config`.

    seconds: projects the time of a video with a configuration, whose max_tokens is the configured one or
    `fewer_tokens`. The tip that streams blocks comes last, because they cannot return to the device.
    cached: False tries every tip but the step cache's own without the step cache.
    """
    whole, plain = config, changed(config, sampling={"step_cache": "none"})
    config = whole if cached else plain
    sampling, video = config.sampling, config.video
    fewer = max(1, sampling.steps // 2)
    trials = [
        (
            "another step cache",
            "step_cache: magcache",
            plain,
            changed(plain, sampling={"step_cache": "magcache"}),
        ),
        (
            "fewer steps",
            f"num_steps {sampling.steps} to {fewer}, no step cache",
            plain,
            changed(plain, sampling={"num_steps": fewer, "timesteps": None}),
        ),
        (
            "lower guidance",
            "guidance_scale 4.5 to 3.5",
            changed(config, sampling={"guidance_scale": 4.5, "audio_scale": None}),
            changed(config, sampling={"guidance_scale": 3.5, "audio_scale": None}),
        ),
        (
            "no guidance",
            "guidance_scale 4.5 to 1",
            changed(config, sampling={"guidance_scale": 4.5, "audio_scale": None}),
            changed(config, sampling={"guidance_scale": 1.0, "audio_scale": None}),
        ),
        (
            "guidance on part of the steps",
            "guidance_interval [0, 1] to [0, 0.5]",
            changed(config, sampling={"guidance_interval": (0.0, 1.0)}),
            changed(config, sampling={"guidance_interval": (0.0, 0.5)}),
        ),
        (
            "distilled LoRA",
            "4 timesteps, guidance_scale 1, no step cache",
            config,
            changed(plain, sampling=DISTILLED),
        ),
        (
            "shorter seq_len (with audio)",
            f"seq_len {video.seq_len} to {max(1, video.seq_len // 2)}",
            config,
            changed(config, video={"seq_len": max(1, video.seq_len // 2)}),
        ),
        (
            "fewer max_tokens",
            f"max_tokens {video.max_tokens} to {fewer_tokens(config)}",
            config,
            changed(config, video={"max_tokens": fewer_tokens(config)}),
        ),
        (
            "smaller overlap",
            "overlap_frame 13 to 5",
            changed(config, video={"overlap_frame": 13}),
            changed(config, video={"overlap_frame": 5}),
        ),
        (
            "few persistent parameters",
            f"num_persistent_param_in_dit to {persistent}, the rest streamed",
            config,
            changed(config, runtime={"memory": "auto", "num_persistent_param_in_dit": persistent}),
        ),
    ]
    if sampling.causal is not None or config.family.chunk is not None:
        return [_try(*trial, seconds) for trial in trials if trial[0] in CAUSAL_TIPS]
    return [_cache_tip(whole, plain, seconds), *(_try(*trial, seconds) for trial in trials)]


def fewer_tokens(config: PipelineConfig) -> int:
    """Two thirds of max_tokens, as in the guide's step from 30,000 to 20,000."""
    return max(1, config.video.max_tokens * 2 // 3)


def _cache_tip(
    config: PipelineConfig, plain: PipelineConfig, seconds: Callable[[PipelineConfig], float]
) -> Tip:
    if config.sampling.cache_policy != "none":
        return _try("step cache", f"{config.sampling.cache_policy} as configured", plain, config, seconds)
    threshold = {"step_cache": "teacache", "tea_cache_l1_thresh": 0.14}
    return _try(
        "step cache", "tea_cache_l1_thresh 0 to 0.14", plain, changed(plain, sampling=threshold), seconds
    )


def _try(
    tip: str,
    change: str,
    before: PipelineConfig,
    after: PipelineConfig,
    seconds: Callable[[PipelineConfig], float],
) -> Tip:
    try:
        return Tip(tip, change, seconds(before), seconds(after))
    except ConfigError as error:
        return Tip(tip, change, None, None, str(error))
