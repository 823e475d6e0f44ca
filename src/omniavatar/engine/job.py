"""The job folder: what one request keeps on disk while it runs, so that it can continue after a crash.

`<output>.job/` beside the output holds:

- `job.json`: the request's identity and the number of windows that are done;
- a video segment for every finished window, and the given latents of the next window;
- the audio features.

A window is done when its segment and its hand-over are on disk; then `job.json` is replaced atomically. The
same command continues after the last done window. If anything that decides the frames has changed, it fails
and names the change. The folder is removed once the video has its final name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from omniavatar.errors import OutputNameError, ResumeError
from omniavatar.media.atomic import (
    atomic_write_bytes,
    atomic_write_json,
    check_writable,
    translate_os_error,
)
from omniavatar.media.slug import slugify
from omniavatar.text import MOST_RECORD_BYTES, JsonError, cut, parse_json, read_json, read_record
from omniavatar.types import RunResult

if TYPE_CHECKING:
    from omniavatar.config.schema import OutputConfig, SamplingConfig

MOST_NAME_BYTES = 255 - len(".partial")
"""Of the output's name, to which the growing file's name adds the most."""
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
        self.folder = output.with_name(output.name + ".job")
        self.partial = output.with_name(f"{output.stem}.partial{output.suffix}")
        self.sidecar = output.with_suffix(".json")
        self.done = self.resumed = 0
        self._state = self.folder / "job.json"
        self.fingerprint: dict[str, str] = {}

    def open(self, values: dict[str, str], resume: bool) -> int:
        """Start or resume the job; returns how many windows are done.

        Raises ResumeError if the folder belongs to another request or configuration.
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
        else:
            self.discard()
            with translate_os_error(self.folder):
                self.folder.mkdir(parents=True)
            self._write_state()
        return self.done

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
        path = self._state if self._state.exists() else self.sidecar
        try:
            printed = (read_record(path) or {})["fingerprint"]
            return {name: parse_json(printed[name]) for name in names if name in printed}
        except (KeyError, TypeError, JsonError):
            return {}

    def amend(self, changes: Mapping[str, str]) -> None:
        """Change these values of the fingerprint, for the windows that follow."""
        self.fingerprint = {**self.fingerprint, **changes}

    def finish_window(self, given: bytes | None) -> None:
        """Record one more window as done; its segment must be on disk.

        - given: given latents of the window after it, as bytes of a safetensors file; None after the last.
        """
        if given is not None:
            atomic_write_bytes(self.given_path(self.done + 1), given)
        self.done += 1
        self._write_state()
        self.given_path(self.done - 1).unlink(missing_ok=True)

    def segment_path(self, window: int) -> Path:
        return self.folder / f"segment_{window:05d}.mp4"

    def given_path(self, window: int) -> Path:
        """File of the given latents of `window`, written after the previous window."""
        return self.folder / f"given_{window:05d}.safetensors"

    def close(self, values: dict[str, Any], keep: bool) -> RunResult:
        """Write the finished video's sidecar and, unless `keep`, remove the folder."""
        atomic_write_json(self.sidecar, values)
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
        """Remove the folder and the growing file."""
        with translate_os_error(self.folder):
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.partial.unlink(missing_ok=True)

    def given(self) -> Tensor | None:
        """Given latents of the next window; None before the first.

        Raises ResumeError if their file is missing or damaged.
        """
        if not self.done:
            return None
        path = self.given_path(self.done)
        if not path.is_file():
            raise ResumeError(f"{path} is missing; use --no-resume to start over")
        try:
            return safetensors.torch.load_file(path)["given"]
        except SafetensorError as error:
            raise ResumeError(f"{path} is damaged ({error}); use --no-resume to start over") from None

    def finished(self, values: dict[str, str]) -> RunResult | None:
        """The result of a finished video that was made from exactly these values; None if there is none."""
        if self.folder.exists() or not self.output.is_file() or not self.sidecar.is_file():
            return None
        sidecar = read_record(self.sidecar) or {}
        if sidecar.get("fingerprint") != values or sidecar.get("bytes") != self.output.stat().st_size:
            return None
        windows, frames = sidecar.get("windows"), sidecar.get("frames")
        if not isinstance(windows, int) or not isinstance(frames, int):
            return None
        return RunResult(self.output, self.sidecar, frames, windows, windows, 0.0)

    def _read_state(self) -> dict[str, Any]:
        remedy = "use --no-resume to start over"
        state = read_json(self._state, MOST_RECORD_BYTES, ResumeError, remedy)
        if state.get("format") != FORMAT:
            raise ResumeError(f"{self._state} was written by another version of omniavatar; {remedy}")
        done, printed = state.get("done"), state.get("fingerprint")
        whole = isinstance(done, int) and not isinstance(done, bool) and done >= 0
        if not whole or not isinstance(printed, dict) or not all(type(v) is str for v in printed.values()):
            raise ResumeError(f"{self._state} is damaged: done or fingerprint is wrong; {remedy}")
        return state

    def _write_state(self) -> None:
        state = {"format": FORMAT, "done": self.done, "fingerprint": self.fingerprint}
        atomic_write_json(self._state, state)


def output_path(output: OutputConfig, sampling: SamplingConfig, index: int, prompt: str) -> Path:
    """Default path of the video of request `index`, by `output.naming`.

    - slug: `<output_dir>/<index>_<slug of the prompt>.mp4`.
    - reference: as the original code, `<output_dir>/<sampling settings>/result_<index>.mp4`.
    """
    if output.naming == "slug":
        return output.output_dir / f"{index:03d}_{slugify(prompt)}.mp4"
    settings = f"seed{sampling.seed}_step{sampling.steps}_cfg{sampling.guidance_scale:g}"
    if sampling.audio_scale is not None:
        settings += f"_audio{sampling.audio_scale:g}"
    return output.output_dir / settings / f"result_{index:03d}.mp4"


def checked_output(output: Path) -> Path:
    """`output`, unchanged. Raises OutputError if no video can be written to it."""
    if output.suffix.lower() != ".mp4":
        raise OutputNameError(f"{output}: the video is written as .mp4; give the output that ending")
    if len(os.fsencode(output.name)) > MOST_NAME_BYTES:
        raise OutputNameError(
            f"{output}: the name is longer than {MOST_NAME_BYTES} bytes, and names of files beside it have "
            "more; choose a shorter one"
        )
    check_writable(output.parent)
    if output.is_dir():
        raise OutputNameError(f"{output}: is a folder; choose another output name")
    return output
