"""OmniAvatar inference: a portrait and a voice become a talking-head video of any length.

    from omniavatar import AvatarPipeline, AvatarRequest

    pipe = AvatarPipeline.from_config("configs/inference_1.3B_optimized.yaml")
    request = AvatarRequest(prompt="...", image="face.jpg", audio="speech.mp3")
    pipe.generate(request, "out.mp4")

Names are imported at first use, so `import omniavatar` does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omniavatar.config.schema import PipelineConfig
    from omniavatar.engine.events import (
        Message,
        RequestFinished,
        RequestStarted,
        StepFinished,
        WindowFinished,
        WindowStarted,
        log_event,
    )
    from omniavatar.engine.pipeline import AvatarPipeline, generate
    from omniavatar.engine.recorder import RunRecorder
    from omniavatar.errors import NumbersError, OmniAvatarError, StoppedError
    from omniavatar.live.chunk import LiveChunk, LiveStats
    from omniavatar.live.session import LiveSession
    from omniavatar.media.frames import frames_to_video, video_to_frames
    from omniavatar.types import AvatarRequest, Event, RunResult, SamplingParams, VideoChunk, Waveform

__version__ = "0.1.0"

__all__ = [
    "AvatarPipeline",
    "AvatarRequest",
    "Event",
    "LiveChunk",
    "LiveSession",
    "LiveStats",
    "Message",
    "NumbersError",
    "OmniAvatarError",
    "PipelineConfig",
    "RequestFinished",
    "RequestStarted",
    "RunRecorder",
    "RunResult",
    "SamplingParams",
    "StepFinished",
    "StoppedError",
    "VideoChunk",
    "Waveform",
    "WindowFinished",
    "WindowStarted",
    "__version__",
    "frames_to_video",
    "generate",
    "log_event",
    "video_to_frames",
]

_HOMES = {
    "AvatarPipeline": "engine.pipeline",
    "generate": "engine.pipeline",
    "frames_to_video": "media.frames",
    "video_to_frames": "media.frames",
    "PipelineConfig": "config.schema",
    "RunRecorder": "engine.recorder",
    "LiveChunk": "live.chunk",
    "LiveSession": "live.session",
    "LiveStats": "live.chunk",
    "NumbersError": "errors",
    "OmniAvatarError": "errors",
    "StoppedError": "errors",
    "log_event": "engine.events",
    "Message": "engine.events",
    "RequestFinished": "engine.events",
    "RequestStarted": "engine.events",
    "StepFinished": "engine.events",
    "WindowFinished": "engine.events",
    "WindowStarted": "engine.events",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'omniavatar' has no attribute {name!r}")
    return getattr(import_module(f"omniavatar.{_HOMES.get(name, 'types')}"), name)
