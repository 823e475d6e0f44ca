"""The job folder: what one request keeps on disk while it runs, so that it can continue after a crash.

`<output>.job/` beside the output holds:

- `job.json`: the request's identity and the number of windows that are done;
- a video segment for every finished window, and the given latents of the next window;
- the audio features.

A window is done when its segment and its hand-over are on disk; then `job.json` is replaced atomically. The
same command continues after the last done window. If anything that decides the frames has changed, it fails
and names the change. The folder is removed once the video has its final name.

A job has one owner at a time: `Job.owned` holds a kernel lock on `owner.lock` in the folder. No file without
our mark (`engine.marks`) is replaced or deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from omniavatar.engine.marks import (
    OWNER,
    STATE,
    is_job_folder,
    is_preview,
    job_files,
    read_record,
    sidecar_record,
)
from omniavatar.errors import ResumeError, TargetError
from omniavatar.media.atomic import atomic_write_bytes, atomic_write_json, beside, translate_os_error
from omniavatar.media.lease import lease_for
from omniavatar.sampling.windows import HandOvers, WindowHandOvers
from omniavatar.text import MOST_RECORD_BYTES, JsonError, cut, parse_json, read_json
from omniavatar.types import RunResult

if TYPE_CHECKING:
    from omniavatar.engine.shown import Shown

FORMAT = 1
"""Version of `job.json`; a folder with another version is not resumed."""


def fingerprint(values: Mapping[str, Any]) -> dict[str, str]:
    """Values that decide the frames, as printable text, sorted by name; long texts are cut and hashed."""
    return {name: _printable(value) for name, value in sorted(values.items())}


def _printable(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return (
        text
        if len(text) <= 200
        else f"{text[:60]}... sha256 {hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:16]}"
    )


def describe_change(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """`name: old -> new` for every value that differs."""
    names = sorted({*old, *new})
    return [
        f"{cut(name)}: {cut(old.get(name, 'absent'), 300)} -> {cut(new.get(name, 'absent'), 300)}"
        for name in names
        if old.get(name) != new.get(name)
    ]


class Job:
    """The job folder of one output file."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = beside(output, "", output.name, ".job")
        self.partial = beside(output, "", output.stem, f".partial{output.suffix}")
        self.sidecar = beside(output, "", output.stem, ".json")
        self.done = self.resumed = 0
        self._state = self.folder / STATE
        self._sums: dict[str, str] = {}
        self._finishing: int | None = None
        self.fingerprint: dict[str, str] = {}
        self.hand_overs: HandOvers = WindowHandOvers()

    @property
    def paths(self) -> dict[str, Path]:
        """Every path that the job writes, by what it is."""
        return {
            "output": self.output,
            "sidecar": self.sidecar,
            "preview": self.partial,
            "job folder": self.folder,
        }

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the lock of this job while the body runs; an empty job folder is removed at the end.

        Raises BusyError if another process or thread holds it, and TargetError for a file that is not ours.
        """
        self.refuse_foreign()
        lease = lease_for(self.folder / OWNER, self.output)
        try:
            with lease:
                yield
        finally:
            with suppress(OSError):  # not empty: it is kept
                self.folder.rmdir()

    def refuse_foreign(self) -> None:
        """Raise TargetError if one of the job's paths is a file or folder that is not ours."""
        remedy = "move it away or choose another output"
        with translate_os_error(self.folder):
            ours = is_job_folder(self.folder)
            if os.path.lexists(self.folder) and not ours:
                raise TargetError(f"{self.folder}: is not a job folder of omniavatar; {remedy}")
            _refuse_kept(self.folder)
        with translate_os_error(self.partial):
            if os.path.lexists(self.partial) and not (
                (ours and _is_file(self.partial)) or is_preview(self.partial)
            ):
                raise TargetError(f"{self.partial}: is not a preview of omniavatar; {remedy}")
            named = sidecar_record(beside(self.partial, "", self.partial.stem, ".json"))
            if named is not None and named.get("output") == self.partial.name and self.partial.exists():
                raise TargetError(f"{self.partial}: is a finished video; {remedy}")
            _refuse_kept(self.partial)
        with translate_os_error(self.sidecar):
            record = sidecar_record(self.sidecar) if _is_file(self.sidecar) else None
            if os.path.lexists(self.sidecar) and record is None:
                raise TargetError(f"{self.sidecar}: was not written by omniavatar; {remedy}")
            other = None if record is None else record.get("output")
            if isinstance(other, str) and other != self.output.name and self._has_other(other):
                raise TargetError(f"{self.sidecar}: belongs to {other}; choose another output")
            _refuse_kept(self.sidecar)
        with translate_os_error(self.output):
            self._refuse_foreign_output(record is not None)
            _refuse_kept(self.output)

    def _has_other(self, name: str) -> bool:
        other = self.output.parent / Path(name).name
        return other.is_file() and not (self.output.exists() and other.samefile(self.output))

    def _refuse_foreign_output(self, has_sidecar: bool) -> None:
        if not os.path.lexists(self.output):
            return
        if not _is_file(self.output):
            raise TargetError(f"{self.output}: is not a regular file; choose another output")
        size = self.output.stat().st_size
        state = read_record(self._state) or {}
        if size and not has_sidecar and state.get("finishing") != size:
            raise TargetError(
                f"{self.output}: exists, and no {self.sidecar.name} of omniavatar lies beside it; "
                "move it away or choose another output"
            )

    def open(self, values: dict[str, str], resume: bool) -> int:
        """Start or resume the job; returns how many windows are done.

        Raises ResumeError if the folder, or the finished video, belongs to another request or configuration.
        """
        self.fingerprint = values
        if self._state.exists() and resume:
            state = self._read_state()
            changes = describe_change(state["fingerprint"], values)
            if changes:
                raise ResumeError(
                    f"{self.folder} holds {state['done']} finished windows of another run; changed: "
                    f"{'; '.join(changes)}. Use --no-resume to start over, or another output name"
                )
            self.done = self.resumed = int(state["done"])
            self._sums, self._finishing = state.get("sums", {}), state.get("finishing")
        else:
            if resume:
                self._refuse_other_video(values)
            self.discard()
            self.done, self._sums = 0, {}
            with translate_os_error(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            self._write_state()
        return self.done

    def _refuse_other_video(self, values: dict[str, str]) -> None:
        record = sidecar_record(self.sidecar)
        if record is None or not self.output.exists():
            return
        changes = describe_change(record["fingerprint"], values)
        if changes:
            raise ResumeError(
                f"{self.output} is a finished video of another request; changed: {'; '.join(changes)}. "
                "Use --no-resume to replace it, or another output name"
            )

    @contextmanager
    def opened(self, values: dict[str, str], resume: bool) -> Iterator[None]:
        """Open the job while the body runs. If no window was finished, the folder is removed at the end."""
        self.open(values, resume)
        try:
            yield
        finally:
            if not self.done:
                self.discard()

    def recorded(self, names: Collection[str]) -> dict[str, Any]:
        """The named values of the identity that the job folder, or else the sidecar, records.

        Missing values are left out.
        """
        try:
            values = read_record(self._state if self._state.exists() else self.sidecar) or {}
            printed = values["fingerprint"]
            return {name: parse_json(printed[name]) for name in names if name in printed}
        except (OSError, KeyError, TypeError, JsonError):
            return {}

    def holds_another(self, values: Mapping[str, str]) -> bool:
        """Whether a video or an unfinished job of another request lies here."""
        held = read_record(self._state) or sidecar_record(self.sidecar)
        return held is not None and held.get("fingerprint") != values

    def amend(self, changes: Mapping[str, str]) -> None:
        """Change these values of the fingerprint, for the windows that follow."""
        self.fingerprint = {**self.fingerprint, **changes}

    def finish_window(self, given: bytes | None) -> None:
        """Record one more window as done; its segment must be on disk.

        - given: what it left for later windows, as bytes of a safetensors file; None after the last.
        """
        if given is not None:
            path = self.given_path(self.done + 1)
            atomic_write_bytes(path, given)
            self._sums[path.name] = _sum(given)
        segment = self.segment_path(self.done)
        self._sums[segment.name] = _sum(segment.read_bytes())
        self.done += 1
        old = self.hand_overs.outdated(self.done)
        passed = None if old is None else self.given_path(old)
        if passed is not None:
            self._sums.pop(passed.name, None)
        self._write_state()
        if passed is not None:
            passed.unlink(missing_ok=True)

    def intact(self, path: Path) -> bool | None:
        """Whether a recorded file is as it was written; None if nothing is recorded of it."""
        recorded = self._sums.get(path.name)
        return None if recorded is None else _sum(path.read_bytes()) == recorded

    def go_back(self, done: int) -> None:
        """Forget the windows from number `done` on; they are made again."""
        self.done = self.resumed = done
        self._write_state()

    def segment_path(self, window: int) -> Path:
        return self.folder / f"segment_{window:05d}.mp4"

    def frames_path(self, window: int) -> Path:
        """The pictures of a window without loss (`engine.segments`)."""
        return self.folder / f"frames_{window:05d}.mp4"

    def given_path(self, window: int) -> Path:
        """The hand-over file that is written before `window` begins."""
        return self.folder / f"given_{window:05d}.safetensors"

    def before_naming(self, temporary: Path) -> None:
        """Record that the finished video gets its name now.

        Raises TargetError if a file that is not ours has taken that name.
        """
        self.refuse_foreign()
        self._finishing = temporary.stat().st_size
        self._write_state()

    def close(self, values: dict[str, Any], keep: bool) -> RunResult:
        """Write the finished video's sidecar and, unless `keep`, remove the folder's files."""
        atomic_write_json(self.sidecar, values, self.folder)
        if not keep:
            self.discard()
        return RunResult(
            self.output,
            self.sidecar,
            values["frames"],
            values["windows"],
            values["resumed_windows"],
            values["seconds"],
        )

    def discard(self) -> None:
        """Remove the growing file and the folder's files, `job.json` last; files of others are kept."""
        with translate_os_error(self.folder):
            self.partial.unlink(missing_ok=True)
            if self.folder.exists():
                for path in job_files(self.folder):
                    if path.name not in (STATE, OWNER):
                        path.unlink(missing_ok=True)
                self._state.unlink(missing_ok=True)

    def given(self, shape: Sequence[int]) -> dict[int, Tensor]:
        """What earlier windows left for the next one, by the number of its file; tensors of `shape`.

        Raises ResumeError if a file is missing or damaged.
        """
        from omniavatar.engine.handover import load_given

        needed = self.hand_overs.needed(self.done) if self.done else ()
        return {number: load_given(self.given_path(number), shape) for number in needed}

    def shown(self, size: tuple[int, int], last: bool, held: bool) -> Shown | None:
        """What the pictures before the next window left; None if it needs nothing of them.

        Arguments as of `Shown.problem`. Raises ResumeError.
        """
        from omniavatar.engine.handover import load_shown

        if not self.done or not (last or held) or self.done not in self.hand_overs.needed(self.done):
            return None
        return load_shown(self.given_path(self.done), size, last, held)

    def finished(self, values: dict[str, str]) -> RunResult | None:
        """The result of a finished video that was made from exactly these values; None if there is none."""
        if self._state.exists() or not self.output.is_file():
            return None
        sidecar = sidecar_record(self.sidecar)
        if sidecar is None or sidecar["fingerprint"] != values or not self._has_recorded_size(sidecar):
            return None
        windows, frames = sidecar.get("windows"), sidecar.get("frames")
        if not isinstance(windows, int) or not isinstance(frames, int):
            return None
        return RunResult(self.output, self.sidecar, frames, windows, windows, 0.0)

    def changed_since(self, values: dict[str, str]) -> bool:
        """Whether the finished video of these values has another size than its sidecar says."""
        sidecar = None if self._state.exists() else sidecar_record(self.sidecar)
        if sidecar is None or sidecar["fingerprint"] != values or not self.output.is_file():
            return False
        return not self._has_recorded_size(sidecar)

    def _has_recorded_size(self, sidecar: Mapping[str, Any]) -> bool:
        return bool(sidecar.get("bytes") == self.output.stat().st_size)

    def _read_state(self) -> dict[str, Any]:
        remedy = "use --no-resume to start over"
        state = read_json(self._state, MOST_RECORD_BYTES, ResumeError, remedy)
        if state.get("format") != FORMAT:
            raise ResumeError(f"{self._state} was written by another version of omniavatar; {remedy}")
        if not _is_whole(state):
            raise ResumeError(f"{self._state} is damaged: done, sums or fingerprint is wrong; {remedy}")
        return state

    def _write_state(self) -> None:
        state: dict[str, Any] = {"format": FORMAT, "done": self.done, "fingerprint": self.fingerprint}
        state["sums"] = self._sums
        if self._finishing is not None:
            state["finishing"] = self._finishing
        atomic_write_json(self._state, state)


def _is_whole(state: Mapping[str, Any]) -> bool:
    """Whether the values of `job.json` have their types."""
    done, printed, sums = state.get("done"), state.get("fingerprint"), state.get("sums", {})
    return (
        isinstance(done, int)
        and not isinstance(done, bool)
        and done >= 0
        and isinstance(sums, dict)
        and isinstance(printed, dict)
        and all(isinstance(value, str) for value in printed.values())
    )


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _is_file(path: Path) -> bool:
    """Whether `path` itself, not what it links to, is a regular file."""
    return os.path.lexists(path) and stat.S_ISREG(path.lstat().st_mode)


def _refuse_kept(path: Path) -> None:
    """Raise TargetError if `path` exists and the system would not let this process replace it."""
    if not os.path.lexists(path):
        return
    owner, folder = path.lstat(), path.parent.stat()
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    remedy = "delete it as that user or choose another output"
    if folder.st_mode & stat.S_ISVTX and user not in (0, owner.st_uid, folder.st_uid):
        raise TargetError(f"{path}: belongs to another user, who alone may replace it here; {remedy}")
    effective = os.access in os.supports_effective_ids
    if path.is_dir() and not os.access(path, os.R_OK | os.W_OK | os.X_OK, effective_ids=effective):
        raise TargetError(f"{path}: belongs to another user and cannot be written; {remedy}")
