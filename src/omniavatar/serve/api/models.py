"""The configured models: what a request may set for each, and what a video of it needs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from omniavatar.config.change import effective_sampling
from omniavatar.config.schema import PipelineConfig
from omniavatar.encoders.image import choose_bucket
from omniavatar.errors import ConfigError
from omniavatar.plan.run import RunPlan, plan_run
from omniavatar.serve.api.errors import NOT_FOUND, ApiError, field_error
from omniavatar.serve.api.refusals import refused_by, with_known_family
from omniavatar.serve.jobs.records import JobStatus, Json
from omniavatar.serve.jobs.store import JobStore
from omniavatar.serve.settings import ServeSettings, load_configs
from omniavatar.types import SamplingParams

REQUEST_KEYS = tuple(field.name for field in fields(SamplingParams))
"""Configuration keys that a request may set."""
_FIELDS = {"num_steps": "num_inference_steps", "seed": "seed", "guidance_scale": "guidance_scale"}


@dataclass(frozen=True)
class Plan:
    """What a video will be. size: (height, width). run: all of its windows, steps and passes."""

    seconds: float
    frames: int
    windows: int
    steps: int
    size: tuple[int, int]
    run: RunPlan


class Catalogue:
    """The models of a server by name; the first is the default.

    Raises ConfigError, CheckpointError for weights of another family than the configuration's.
    """

    def __init__(self, configs: Mapping[str, PipelineConfig], most_steps: int) -> None:
        self.configs = {name: with_known_family(config) for name, config in configs.items()}
        self._most_steps = most_steps

    @classmethod
    def load(cls, settings: ServeSettings) -> Catalogue:
        """Raises ConfigError, CheckpointError."""
        return cls(load_configs(settings), settings.most_steps)

    def name(self, asked: str | None) -> str:
        """The model's name, or the default's. Raises ApiError."""
        if asked is None:
            return next(iter(self.configs))
        if asked not in self.configs:
            names = ", ".join(self.configs)
            raise ApiError(
                404, "model_not_found", f"model: is none of {names}; choose one", "model", NOT_FOUND
            )
        return asked

    def settings(self, model: str, given: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Json]:
        """The request's settings by configuration key. Raises ApiError that names the field.

        given: fields of the dialect by configuration key. extra: `extra_params`.
        """
        for key in extra:
            if key not in REQUEST_KEYS:
                keys = ", ".join(REQUEST_KEYS)
                raise field_error(
                    f"extra_params.{key[:100]}",
                    f"cannot be set by a request; choose from {keys}",
                    "unknown_field",
                )
        values = {key: value for key, value in (*extra.items(), *given.items()) if value is not None}
        config = self.configs[model]
        configured = config.sampling
        for key in values:
            param = _FIELDS[key] if key in given and given[key] is not None else f"extra_params.{key}"
            try:
                checked = effective_sampling(configured, SamplingParams(**{key: values[key]}), config.family)
            except ConfigError as error:
                text = str(error).removeprefix("request: ").partition(": ")[2]
                raise field_error(param, text.replace("Input should be", "must be")) from None
            refusal = refused_by(config, checked)
            if refusal is not None:
                raise field_error(param, refusal)
            if key in ("num_steps", "timesteps") and checked.steps > self._most_steps:
                raise field_error(
                    param, f"asks for {checked.steps} steps; at most {self._most_steps} are allowed"
                )
        try:
            checked = effective_sampling(configured, SamplingParams(**values), config.family)
        except ConfigError as error:
            raise field_error("extra_params", str(error).removeprefix("request: ")) from None
        refusal = refused_by(config, checked)
        if refusal is not None:
            raise field_error("extra_params", refusal)
        return {key: checked.model_dump(mode="json")[key] for key in values}

    def check_provenance(self, model: str) -> None:
        """Raise ApiError if the server has no certificate to sign the model's videos with."""
        if self.configs[model].output.provenance_certificate is None:
            raise field_error(
                "provenance", "this server has no certificate to sign with; leave it out", "not_available"
            )

    def size(self, model: str, asked: str | None) -> tuple[int, int] | None:
        """(height, width) of the dialect's WxH. Raises ApiError."""
        if asked is None:
            return None
        sizes = self.configs[model].video.sizes
        for height, width in sizes:
            if asked == f"{width}x{height}":
                return height, width
        choices = ", ".join(f"{width}x{height}" for height, width in sizes)
        raise field_error("size", f"is not supported by {model}; choose from {choices}")

    def plan(
        self,
        model: str,
        size: tuple[int, int] | None,
        portrait: tuple[int, int] | None,
        seconds: float | None,
        settings: Mapping[str, Json],
    ) -> Plan:
        """The planner's answer. Raises ConfigError."""
        config = self.configs[model]
        video = config.video
        if size is None:
            size = choose_bucket(*portrait, video.sizes) if portrait else video.sizes[0]
        sampling = effective_sampling(config.sampling, SamplingParams(**settings))  # type: ignore[arg-type]
        config = config.model_copy(update={"sampling": sampling})
        samples = None
        if seconds is not None:
            samples = round((seconds + video.silence_duration_s) * video.sample_rate)
        plan = plan_run(config, size, samples)
        return Plan(plan.duration_s, plan.frames, len(plan.windows), plan.steps, size, plan)


def window_seconds(store: JobStore, model: str) -> float | None:
    """Median seconds of a window of the model's last videos; None before the first. Raises StoreError."""
    taken = [
        (job.completed_at - job.started_at) / (job.windows - job.resumed_windows)
        for job in store.list(status=JobStatus.completed, limit=50).jobs
        if job.spec.model == model
        and job.started_at is not None
        and job.completed_at is not None
        and job.windows > job.resumed_windows
    ]
    return statistics.median(taken) if taken else None
