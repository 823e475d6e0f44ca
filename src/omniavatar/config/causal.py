"""Which settings make no sense with `sampler: causal`, and which only make sense with it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from omniavatar.config.values import FieldError
from omniavatar.errors import ConfigError

if TYPE_CHECKING:
    from omniavatar.config.schema import RuntimeConfig, SamplingConfig

CAUSAL_FIELDS = ("causal_block", "causal_window", "causal_sink")
"""Fields of the sampling section that only `sampler: causal` reads."""
WINDOW_FIELDS = ("overlap_frame", "max_tokens")
"""Fields of the video section that set the windows of the other samplers."""


def check_causal_sampling(sampling: SamplingConfig) -> None:
    """Raise FieldError if a field contradicts the sampler."""
    try:
        causal = sampling.causal
    except ConfigError as error:
        name, _, text = str(error).partition("=")
        raise FieldError(text.partition(": ")[2], name) from error
    if causal is None:
        fields = type(sampling).model_fields
        for name in CAUSAL_FIELDS:
            if getattr(sampling, name) != fields[name].default:
                raise FieldError(
                    f"has no effect with sampler: {sampling.sampler}; leave it out or set sampler to causal",
                    name,
                    "sampler",
                )
        return
    _refuse_guidance(sampling)
    _refuse_step_cache(sampling)


def _refuse_guidance(sampling: SamplingConfig) -> None:
    what = "sampler: causal runs one pass a step, without guidance"
    if sampling.guidance_scale != 1:
        raise FieldError(f"{what}; set guidance_scale to 1", "guidance_scale", "sampler")
    if sampling.audio_scale not in (None, 1):
        raise FieldError(f"{what}; leave audio_scale out", "audio_scale", "sampler")
    if sampling.guidance_interval != (0.0, 1.0):
        raise FieldError(f"{what}; leave guidance_interval out", "guidance_interval", "sampler")


def _refuse_step_cache(sampling: SamplingConfig) -> None:
    if sampling.cache_policy != "none":
        name = "tea_cache_l1_thresh" if sampling.step_cache is None else "step_cache"
        raise FieldError(f"sampler: causal computes every step; leave {name} out", name, "sampler")


def check_causal_video(given: Collection[str], runtime: RuntimeConfig) -> None:
    """Raise FieldError for settings outside the sampling section that `sampler: causal` cannot follow.

    - given: the fields of the video section that the user set.
    """
    for name in WINDOW_FIELDS:
        if name in given:
            raise FieldError(
                f"sampler: causal makes blocks of causal_block latents, not windows; leave {name} out",
                f"video.{name}",
                "sampling.sampler",
            )
    for name in ("sp_size", "cfg_parallel"):
        if getattr(runtime, name) > 1:
            raise FieldError(
                f"sampler: causal makes a video on one GPU; leave {name} out, or give several videos to "
                "`omniavatar batch`",
                f"runtime.{name}",
                "sampling.sampler",
            )
