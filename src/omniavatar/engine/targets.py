"""Where videos are written: default names, what a path may be, and which paths exclude each other.

No output, sidecar, preview or job folder may be an input, or a path that another line of the same input file
writes. Links and file systems that fold case are taken into account.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omniavatar.engine.job import Job
from omniavatar.errors import TargetError
from omniavatar.media.atomic import check_writable, translate_os_error
from omniavatar.media.slug import slugify
from omniavatar.text import printable

if TYPE_CHECKING:
    from omniavatar.config.schema import OutputConfig, PipelineConfig, SamplingConfig
    from omniavatar.plan.placement import Placement
    from omniavatar.types import AvatarRequest

MOST_NUMBERS = 10_000
"""Default names tried in one folder."""


@dataclass(frozen=True)
class Identified:
    """The identity of a request with the placement that belongs to it."""

    placement: Placement
    values: dict[str, str]


def output_path(output: OutputConfig, sampling: SamplingConfig, index: int, prompt: str) -> Path:
    """Default path of the video of request `index`, by `output.naming`.

    - slug: `<output_dir>/<index>_<slug of the prompt>.mp4`; `video` without a prompt.
    - reference: as the original code, `<output_dir>/<sampling settings>/result_<index>.mp4`.
    """
    if output.naming == "slug":
        name = slugify(prompt) if prompt.strip() else "video"
        return output.output_dir / f"{index:03d}_{name}.mp4"
    settings = f"seed{sampling.seed}_step{sampling.steps}_cfg{sampling.guidance_scale:g}"
    if sampling.audio_scale is not None:
        settings += f"_audio{sampling.audio_scale:g}"
    return output.output_dir / settings / f"result_{index:03d}.mp4"


def checked_output(output: Path) -> Path:
    """As `resolved_output`, and the folder exists and is writable. Raises OutputError too."""
    output = resolved_output(output)
    check_writable(output.parent)
    return output


def resolved_output(output: Path) -> Path:
    """The path of the video for `output`: itself, or what it links to.

    Raises TargetError if it can be no video.
    """
    check_name(output)
    if output.is_symlink():
        target = _resolved(output)
        try:
            check_name(target)
        except TargetError as error:
            raise TargetError(f"{output}: is a link to {error}") from None
        output = target
    return output


def check_name(output: Path) -> None:
    """Raise TargetError if `output` can be no file name of a video."""
    if "\0" in str(output):
        raise TargetError(f"{printable(str(output))}: the name holds a NUL character; choose another output")
    if output.suffix.lower() != ".mp4":
        raise TargetError(f"{output}: the video is written as .mp4; give the output that ending")
    with translate_os_error(output), suppress(FileNotFoundError):
        if stat.S_ISDIR(output.stat().st_mode):
            raise TargetError(f"{output}: is a folder; choose another output name")


def _resolved(link: Path) -> Path:
    try:
        return link.resolve()
    except (OSError, RuntimeError):
        raise TargetError(f"{link}: its links lead in a circle; choose another output") from None


@dataclass(frozen=True)
class Target:
    """The wanted output of one request.

    output: a path that ends in .mp4, an existing folder, or None for the configured folder. In a folder, the
    video gets the first number that is free or belongs to the same request.
    """

    output: Path | None
    config: PipelineConfig
    request: AvatarRequest

    @property
    def numbered(self) -> bool:
        """Whether the output is a folder, in which the video gets a default name."""
        if self.output is None:
            return True
        if "\0" in str(self.output) or self.output.suffix.lower() == ".mp4":
            return False
        with translate_os_error(self.output):
            return self.output.is_dir()

    def check(self) -> None:
        """Raise OutputError or TargetError for what is known to be impossible before any work."""
        if self.numbered:
            check_writable(self._path(0).parent)
        else:
            assert self.output is not None
            job = Job(checked_output(self.output))
            refuse_inputs(job, input_files(self.request))
            job.refuse_foreign()

    @contextmanager
    def owned(self, identify: Callable[[Job], Identified]) -> Iterator[tuple[Job, Identified]]:
        """The job and its identity, locked while the body runs. Raises BusyError, TargetError."""
        for job in self._jobs():
            refuse_inputs(job, input_files(self.request))
            with job.owned():
                found = identify(job)
                if self.numbered and job.holds_another(found.values):
                    continue
                yield job, found
                return

    def _jobs(self) -> Iterator[Job]:
        """The job of the wanted path, or those of the numbered names that are not a user's."""
        if not self.numbered:
            assert self.output is not None
            yield Job(checked_output(self.output))
            return
        inputs, last = input_files(self.request), None
        for number in range(MOST_NUMBERS):
            job = Job(self._path(number))
            try:
                checked_output(job.output)
                refuse_inputs(job, inputs)
                job.refuse_foreign()
            except TargetError as error:
                last = error
            else:
                yield job
        raise last or TargetError(f"{self._path(0).parent}: all default names are taken; give --output")

    def _path(self, number: int) -> Path:
        output = self.config.output
        if self.output is not None:
            output = output.model_copy(update={"output_dir": self.output})
        return output_path(output, self.config.sampling, number, self.request.prompt)


def input_files(request: AvatarRequest) -> dict[str, Path]:
    """The files that the request reads, by what they are."""
    named = {"image": request.image, "audio": request.audio, "video it goes on from": request.continues}
    return {kind: Path(value) for kind, value in named.items() if isinstance(value, str | Path)}


def refuse_inputs(job: Job, inputs: dict[str, Path]) -> None:
    """Raise TargetError if a path that the job writes is one of the inputs, also by a link."""
    for kind, path in inputs.items():
        for what, written in job.paths.items():
            if _same_file(written, path):
                raise TargetError(
                    f"{written}: the {what} would replace the {kind} {path}; choose another output"
                )
        if _same_file(job.folder, path.parent):
            raise TargetError(
                f"{path}: the {kind} lies in the job folder of {job.output}; choose another output"
            )


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):  # one of them does not exist
        return False
