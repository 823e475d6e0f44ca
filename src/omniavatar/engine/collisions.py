"""All targets of an input file, checked before its first video is started."""

from __future__ import annotations

import os
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from omniavatar.config.schema import PipelineConfig
from omniavatar.engine.job import Job
from omniavatar.engine.requests_file import BadLine, RequestLine
from omniavatar.engine.targets import resolved_output
from omniavatar.errors import InputError, TargetError
from omniavatar.media.atomic import check_writable


def check_lines(
    lines: Sequence[RequestLine | BadLine], config: PipelineConfig, folder: Path | None = None
) -> list[RequestLine | BadLine]:
    """The lines, with a `BadLine` in place of each whose video would harm a file or another line's video.

    folder: of the videos (default: the configured one).

    Raises OutputError if the folder cannot be written.
    """
    checks = _Checks(lines, config, folder)
    return [line if isinstance(line, BadLine) else checks.checked(line) for line in lines]


class _Checks:
    def __init__(
        self, lines: Sequence[RequestLine | BadLine], config: PipelineConfig, folder: Path | None
    ) -> None:
        self._config, self._folder = config, folder
        self._writers: dict[tuple[Path, str], tuple[int, str]] = {}
        self._folders: dict[Path, Path] = {}
        self._folds: dict[Path, bool] = {}
        self._readers: dict[tuple[int, int], tuple[int, str]] = {}
        for line in lines:
            if isinstance(line, RequestLine):
                for kind, path in (("image", line.image), ("audio", line.audio)):
                    if path is not None and (key := _file_key(path)) is not None:
                        self._readers.setdefault(key, (line.line, kind))

    def checked(self, line: RequestLine) -> RequestLine | BadLine:
        try:
            self._check(line)
        except TargetError as error:
            return BadLine(line.index, line.line, InputError(f"line {line.line}: {error}"))
        return line

    def _check(self, line: RequestLine) -> None:
        target = line.target(self._config)
        job = Job(resolved_output(target if self._folder is None else self._folder / target.name))
        if job.output.parent not in self._folders:
            check_writable(job.output.parent)
            self._folders[job.output.parent] = job.output.parent.resolve()
        for what, path in job.paths.items():
            key = _file_key(path)
            if key is not None and key in self._readers:
                number, kind = self._readers[key]
                raise TargetError(
                    f"its {what} {path.name} would replace the {kind} of line {number}; "
                    "set a different output name"
                )
        job.refuse_foreign()
        names = {self._name_key(path): what for what, path in job.paths.items()}
        for name, what in names.items():
            if name in self._writers:
                number, other = self._writers[name]
                raise TargetError(
                    f"its {what} {name[1]} is already used by line {number}, as its {other}; "
                    "set a different output name"
                )
        self._writers |= {name: (line.line, what) for name, what in names.items()}

    def _name_key(self, path: Path) -> tuple[Path, str]:
        """Equal for two paths that the file system takes for one."""
        folder = self._folders[path.parent]
        if folder not in self._folds:
            self._folds[folder] = folds_case(folder)
        name = unicodedata.normalize("NFC", path.name).casefold() if self._folds[folder] else path.name
        return folder, name


def folds_case(folder: Path) -> bool:
    """Whether `folder` finds a file by its name in capitals too."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".case-test-") as file:
        return Path(file.name).with_name(Path(file.name).name.upper()).exists()


def _file_key(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # it does not exist, or is refused where it is opened
        return None
    return found.st_dev, found.st_ino
