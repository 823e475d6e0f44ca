"""The warnings about a portrait and a voice before a video is made, without prompt and DiT."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from omniavatar.config.schema import PipelineConfig
from omniavatar.engine.events import Message
from omniavatar.engine.memory_inputs import LocalRequest, in_files
from omniavatar.engine.models import Models
from omniavatar.engine.prepare import (
    WAVEFORM,
    encode_inputs,
    fitted_portrait,
    plan_request,
    read_inputs,
)
from omniavatar.engine.recorder import RunRecorder
from omniavatar.media.temporary import temporary_folder
from omniavatar.plan.preview import with_family
from omniavatar.types import AvatarRequest, Event


class InputCheck:
    """Checks inputs for one configuration.

    The VAE and the audio encoder are loaded once if the configuration has `input_limits`. Otherwise only the
    sound is checked, without any weights.
    """

    def __init__(self, config: PipelineConfig) -> None:
        self._config = config
        self._found: list[Message] = []

    def warnings(self, request: AvatarRequest) -> list[Message]:
        """What a run of the request would warn of, each about one of its inputs.

        Raises InputError, ConfigError, CheckpointError.
        """
        self._found.clear()
        with in_files(request) as local, temporary_folder("check") as folder:
            if self._config.model.input_limits is None:
                return self._of_sound(local, folder)
            models = self._models
            planned = plan_request(models, read_inputs(models, local), folder)
            encode_inputs(models, planned, fitted_portrait(planned.inputs.image, planned.plan))
        return list(self._found)

    @cached_property
    def _models(self) -> Models:
        return Models(with_family(self._config), RunRecorder([self._listen]))

    def _listen(self, event: Event) -> None:
        if isinstance(event, Message) and event.about:
            self._found.append(event)

    def _of_sound(self, request: LocalRequest, folder: Path) -> list[Message]:
        from omniavatar.media.audio import decode_mono

        if request.audio is None:
            return []
        video = self._config.video
        track = decode_mono(request.audio, folder / WAVEFORM, video.sample_rate, video.silence_duration_s)
        return [Message(note, "warning", "audio") for note in track.notes]
