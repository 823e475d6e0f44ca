"""Destinations of finished videos: a folder, or any URL that fsspec can write to.

For a folder, the engine writes the video in place and renames it when it is complete. For a URL, the engine
writes into a local staging folder. The finished file is uploaded under a temporary name, checked by size and
renamed; its `.json` follows and marks it as complete. Each step is retried when the network fails. A receipt
in the staging folder outlives the local copy: a batch interrupted right after a delivery does not make the
video again.
"""

from __future__ import annotations

import json
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from omniavatar.config.values import expanded
from omniavatar.engine.marks import is_sidecar
from omniavatar.errors import ConfigError, OutputError, ResourceError, TargetError
from omniavatar.media.atomic import atomic_write_json, beside, check_writable
from omniavatar.media.lease import remove_stale, try_lease
from omniavatar.text import read_record

_LOCK = re.compile(r"\.batch-[0-9a-f]+|\..*(\.mp4|~[0-9a-f]{10})\.lock", re.DOTALL | re.IGNORECASE)


def item_lock(video: Path) -> Path:
    """The lock file of the worker that makes `video`."""
    return beside(video, ".", video.name, ".lock")


class Destination(Protocol):
    """Where videos go. The driver and the workers use the same value; it is pickled for the workers."""

    def prepared(self) -> AbstractContextManager[None]:
        """For the driver, around the whole batch: make the destination writable. Raises OutputError."""
        ...

    def check(self) -> None:
        """For a worker, at its start: raise OutputError unless it sees the driver's folder."""
        ...

    def sizes(self) -> Mapping[str, int]:
        """Size in bytes of every file at the destination, by name."""
        ...

    def local(self, name: str) -> Path:
        """Local path to which the engine writes the video `name`."""
        ...

    def delivered(self, name: str, identity: str) -> int | None:
        """Size in bytes of the video if it was delivered already and made for `identity`, else None."""
        ...

    def refuse_foreign(self, name: str) -> None:
        """Raise TargetError if the destination holds a file of this name that is not ours."""
        ...

    def deliver(self, name: str, identity: str) -> int:
        """Move the finished video to the destination; returns its size in bytes. Raises OutputError."""
        ...


@dataclass(frozen=True)
class FolderDestination:
    """A folder that the driver and all workers share."""

    folder: Path
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def _probe(self) -> Path:
        return self.folder / f".batch-{self.token}"

    @contextmanager
    def prepared(self) -> Iterator[None]:
        check_writable(self.folder)
        for path in self.folder.iterdir():
            if _LOCK.fullmatch(path.name):
                remove_stale(path)
        lease = try_lease(self._probe)
        assert lease is not None
        with lease:
            yield

    def check(self) -> None:
        if not self._probe.exists():
            raise OutputError(
                f"{self.folder}: {socket.gethostname()} does not see this folder of the driver; "
                "set --output to a folder that all machines share, or to a URL"
            )

    def sizes(self) -> Mapping[str, int]:
        return {path.name: path.stat().st_size for path in self.folder.iterdir() if path.is_file()}

    def local(self, name: str) -> Path:
        return self.folder / name

    def delivered(self, name: str, identity: str) -> int | None:
        return None  # the engine itself recognises a finished video

    def refuse_foreign(self, name: str) -> None:
        return None  # the engine refuses it

    def deliver(self, name: str, identity: str) -> int:
        return self.local(name).stat().st_size


@dataclass(frozen=True)
class RemoteDestination:
    """A folder on a file system that fsspec supports, filled from a local staging folder."""

    url: str
    staging: Path
    tries: int = 5
    wait_s: float = 1.0

    @contextmanager
    def prepared(self) -> Iterator[None]:
        system, root = self._open()
        self._retry("cannot make the folder", lambda: system.makedirs(root, exist_ok=True))
        check_writable(self.staging)
        yield

    def check(self) -> None:
        check_writable(self.staging)
        self._open()

    def sizes(self) -> Mapping[str, int]:
        system, root = self._open()
        entries = self._retry("cannot list the folder", lambda: system.ls(root, detail=True))
        return {entry["name"].rsplit("/", 1)[-1]: entry["size"] or 0 for entry in entries}

    def local(self, name: str) -> Path:
        return self.staging / name

    def delivered(self, name: str, identity: str) -> int | None:
        receipt = read_record(self._receipt(name)) or {}
        if receipt.get("identity") != identity:
            return None
        size = receipt.get("bytes")
        return size if isinstance(size, int) and self.sizes().get(name) == size else None

    def refuse_foreign(self, name: str) -> None:
        if self.local(name).exists() or self._receipt(name).exists():
            return  # a delivery of ours was cut off, or made
        system, root = self._open()
        sidecar = f"{root}/{_sidecar(self.local(name)).name}"
        taken = [
            path
            for path in (f"{root}/{name}", sidecar)
            if self._retry("cannot look for the video", partial(system.exists, path))
        ]
        if not taken:
            return
        text = self._retry("cannot read", partial(system.cat_file, sidecar)) if sidecar in taken else b""
        try:
            ours = is_sidecar(json.loads(text))
        except (ValueError, RecursionError):
            ours = False
        if not ours:
            raise TargetError(
                f"{taken[0]}: exists at {self.url}, and omniavatar did not write it; "
                "move it away or choose another output"
            )

    def deliver(self, name: str, identity: str) -> int:
        system, root = self._open()
        video = self.local(name)
        sidecar = _sidecar(video)
        size = video.stat().st_size
        for path in (video, sidecar):
            self._retry(f"cannot upload {path.name}", partial(upload, system, path, f"{root}/{path.name}"))
        atomic_write_json(self._receipt(name), {"identity": identity, "bytes": size})
        for path in (video, sidecar):
            path.unlink()
        return size

    def _retry(self, failure: str, action: Callable[[], Any]) -> Any:
        """The result of `action`, retried with growing pauses.

        failure: message for the OutputError after the last attempt.
        """
        return retried(f"{self.url}: {failure}", action, self.tries, self.wait_s)

    def _open(self) -> tuple[Any, str]:
        """The file system and the folder's path in it."""
        return open_url(self.url, f"--output {self.url}")

    def _receipt(self, name: str) -> Path:
        return beside(self.staging / name, "", name, ".delivered")


def _sidecar(video: Path) -> Path:
    """The file that the engine writes beside `video`."""
    return beside(video, "", video.stem, ".json")


def open_url(url: str, named: str) -> tuple[Any, str]:
    """The fsspec file system of `url`, and the folder's path in it.

    named: the option and its value, for messages.

    Raises ConfigError, ResourceError.
    """
    try:
        import fsspec
    except ImportError:
        raise ResourceError(
            f"{named}: the package fsspec is missing; pip install 'omniavatar[batch]'"
        ) from None
    try:
        system, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{named}: {error}") from None
    return system, str(root).rstrip("/")


def retried(failure: str, action: Callable[[], Any], tries: int, wait_s: float) -> Any:
    """The result of `action`, retried with growing pauses. Catches all errors: backends raise many kinds.

    failure: message for the OutputError after the last attempt.
    """
    for attempt in range(tries):
        try:
            return action()
        except Exception as error:
            if attempt + 1 == tries:
                raise OutputError(
                    f"{failure} after {tries} attempts ({type(error).__name__}: "
                    f"{error}); check the connection and permissions, then give the same command again"
                ) from error
            time.sleep(wait_s * 2**attempt)


def upload(system: Any, path: Path, target: str) -> None:
    """Copy `path` to `target` of an fsspec file system: under a temporary name, checked by size, renamed."""
    folder, _, name = target.rpartition("/")
    part = f"{folder}/.{name}.{secrets.token_hex(4)}.part"
    try:
        system.put_file(str(path), part)
        system.invalidate_cache()
        uploaded, size = system.info(part)["size"], path.stat().st_size
        if uploaded != size:
            raise OSError(f"{uploaded} of {size} bytes arrived")
        system.mv(part, target)
    except Exception:
        _forget(system, part)
        raise


def _forget(system: Any, part: str) -> None:
    """Remove the partial file of a failed upload; if that fails too, its name ends in `.part`."""
    try:
        system.rm_file(part)
    except Exception:
        return


def make_destination(output: str, staging: Path) -> Destination:
    """The destination for `output`, a URL (`s3://bucket/folder`) or a folder."""
    if "://" in output:
        return RemoteDestination(output, staging)
    return FolderDestination(expanded(output, "--output"))
