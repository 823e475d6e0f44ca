"""How several processes share one video, where the configuration leaves it open."""

from __future__ import annotations

from omniavatar.config.change import changed
from omniavatar.config.schema import PipelineConfig
from omniavatar.errors import ConfigError
from omniavatar.sampling.guidance import guidance_branches


def shared_among(config: PipelineConfig, count: int, asked: str) -> PipelineConfig:
    """`config` for `count` processes a video; asked: where the count comes from, for errors.

    With neither `sp_size` nor `cfg_parallel` set, guidance is spread first, and tokens over the rest. Raises
    ConfigError when both make another number.
    """
    runtime = config.runtime
    if runtime.processes == count:
        return config
    if runtime.processes > 1:
        raise ConfigError(
            f"{asked}, but sp_size x cfg_parallel is {runtime.processes}; give as many, or leave sp_size and "
            "cfg_parallel out"
        )
    groups = _guidance_groups(config, count)
    return changed(config, runtime={"cfg_parallel": groups, "sp_size": count // groups})


def _guidance_groups(config: PipelineConfig, count: int) -> int:
    """Guidance over groups needs next to no exchange, but every branch at every step to keep all busy."""
    sampling = config.sampling
    branches = len(guidance_branches(sampling.guidance_scale, sampling.effective_audio_scale, has_audio=True))
    return branches if count % branches == 0 and sampling.guidance_interval == (0.0, 1.0) else 1
