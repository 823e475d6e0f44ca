"""What a worker would refuse of a request and its model tell at once, before a job is accepted.

A server that has no weights on its disk cannot know their sizes; its workers then say what depends on them.
"""

from __future__ import annotations

from omniavatar.assets import pocket
from omniavatar.config.schema import PipelineConfig, SamplingConfig
from omniavatar.errors import OmniAvatarError, for_clients
from omniavatar.serve.api.checks import VOICE
from omniavatar.serve.api.errors import ApiError, field_error
from omniavatar.serve.jobs.records import JobRecord

_NOT_MEASURED = "this server has no measurement of the model for it; leave it out"


def with_known_family(config: PipelineConfig) -> PipelineConfig:
    """`config` with the family that its weights tell, unless it is known without reading them.

    Raises ConfigError, CheckpointError.
    """
    if config.model.family != "auto" or pocket.holds(*config.model.dit_path):
        return config
    from omniavatar.plan.preview import with_family  # imports PyTorch, which an API alone does not need

    return with_family(config)


def check_sampling(config: PipelineConfig, sampling: SamplingConfig) -> None:
    """Raise an OmniAvatarError for settings that do not fit what is measured or sparse of the model."""
    config.sparsity.check_steps(sampling.steps)
    if sampling.cache_policy == "none":
        return
    from omniavatar.plan.preview import files_exist, find_dit_config  # as above

    if config.model.weights == "random" or files_exist(config.model):
        from omniavatar.plan.calibration import find_constants
        from omniavatar.plan.steps import needed_constants

        dit, _ = find_dit_config(config.model)
        needed_constants(sampling, find_constants(config.model, sampling, dit))


def refused_by(config: PipelineConfig, sampling: SamplingConfig) -> str | None:
    """Why a request's settings are refused, as a client may read it; None if they are not.

    What the configuration itself does not fit is not the request's fault.
    """
    try:
        check_sampling(config, sampling)
    except OmniAvatarError as error:
        try:
            check_sampling(config, config.sampling)
        except OmniAvatarError:
            return None
        text = str(error)
        return text if for_clients(type(error), text) == text else _NOT_MEASURED
    return None


def check_voice(config: PipelineConfig, given: bool) -> None:
    """Raise ApiError if the model needs a voice that is not given, or hears none."""
    heads = config.family.chunk is not None
    if heads and not given:
        text = f"is missing; {config.family.name} makes its frames from a voice, so add one"
        raise field_error(VOICE, text, "missing_field")
    if given and not heads and config.model.weights == "files" and not config.model.use_audio:
        raise field_error(VOICE, "has no effect: this model has no audio layers; leave it out")


def check_extension(config: PipelineConfig, source: JobRecord) -> None:
    """Raise ApiError if the model cannot go on from the finished video."""
    remedy = "make a new video of the whole sound"
    video, size = config.video, source.spec.size
    if config.family.chunk is not None:
        why = f"is of {config.family.name}, whose chunks each hear the 8 s before them"
    elif config.sampling.causal is not None:
        why = "is of a block-causal model, which does not go on from a finished video"
    elif size is not None and size not in video.sizes:
        why = f"has {size[1]}x{size[0]} pixels, which the model no longer makes here"
    elif source.seconds is not None and round(source.seconds * video.fps) < video.overlap_frame:
        frames = round(source.seconds * video.fps)
        why = f"has {frames} frames, fewer than the {video.overlap_frame} that its next window is given"
    else:
        return
    raise ApiError(400, "not_extendable", f"video_id: the video {why}; {remedy}", "video_id")
