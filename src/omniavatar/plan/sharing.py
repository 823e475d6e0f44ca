"""How several processes share one video, if the configuration does not say."""

from __future__ import annotations

from omniavatar.config.change import changed
from omniavatar.config.schema import PipelineConfig
from omniavatar.errors import ConfigError
from omniavatar.sampling.guidance import guidance_branches


def shared_among(config: PipelineConfig, count: int, source: str) -> PipelineConfig:
    """`config` for `count` processes a video.

    If neither `sp_size` nor `cfg_parallel` is set, guidance is spread first, then tokens over the rest.

    - source: the option that sets the count, for the error message.

    Raises ConfigError if `sp_size` x `cfg_parallel` is set to another number.
    """
    runtime = config.runtime
    if runtime.processes == count:
        return config
    if config.sampling.causal is not None:
        raise ConfigError(
            f"{source}, but sampler: causal makes a video on one GPU; choose one GPU, or make several videos "
            "with `omniavatar batch`"
        )
    if config.family.chunk is not None:
        raise ConfigError(f"{source}, but {config.family.name}: {config.family.refused['runtime.sp_size']}")
    if runtime.processes > 1:
        raise ConfigError(
            f"{source}, but sp_size x cfg_parallel is {runtime.processes}; give the same number, or leave "
            "sp_size and cfg_parallel out"
        )
    groups = _guidance_groups(config, count)
    return changed(config, runtime={"cfg_parallel": groups, "sp_size": count // groups})


def _guidance_groups(config: PipelineConfig, count: int) -> int:
    """Groups of processes, one a guidance branch, or 1.

    Groups exchange almost nothing, but all are busy only if every branch runs at every step.
    """
    sampling = config.sampling
    branches = len(guidance_branches(sampling.guidance_scale, sampling.effective_audio_scale, has_audio=True))
    return branches if count % branches == 0 and sampling.guidance_interval == (0.0, 1.0) else 1
