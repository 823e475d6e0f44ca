"""Where finished videos go: a folder, or any place fsspec can write to.

Into a folder the engine writes itself: a video gets its name by rename when it is whole. For a URL it writes
into a local staging folder first; the whole file is then uploaded under a temporary name, checked by size
and moved to its name, and its `.json` follows as the mark that it is complete. Each step is tried again when
the network fails. A receipt in the staging folder outlives the local copy, so that a batch that is cut right
after a delivery does not make the video again.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from omniavatar.errors import ConfigError, OutputError, ResourceError
from omniavatar.media.atomic import atomic_write_json, check_writable
from omniavatar.serve.batch.lease import try_lease


class Destination(Protocol):
    """Where videos go; the same value is used by the driver and, pickled, by the workers."""

    def prepared(self) -> AbstractContextManager[None]:
        """Driver, around the whole batch: make sure that it can be written. Raises OutputError."""
        ...

    def check(self) -> None:
        """Worker, at its start: raise OutputError if it does not see what the driver sees."""
        ...

    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file that lies there, by name."""
        ...

    def local(self, name: str) -> Path:
        """Path the engine writes the video `name` to."""
        ...

    def delivered(self, name: str, identity: str) -> int | None:
        """Worker: bytes of the video if it lies there already and was made for `identity`."""
        ...

    def deliver(self, name: str, identity: str) -> int:
        """Worker: bring the finished video there; returns its bytes. Raises OutputError."""
        ...


@dataclass(frozen=True)
class FolderDestination:
    """A folder that driver and workers share."""

    folder: Path
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def _probe(self) -> Path:
        return self.folder / f".batch-{self.token}"

    @contextmanager
    def prepared(self) -> Iterator[None]:
        check_writable(self.folder)
        for left in (*self.folder.glob(".batch-*"), *self.folder.glob(".*.mp4.lock")):
            if (stale := try_lease(left)) is not None:  # of a process that was killed
                stale.release()
        lease = try_lease(self._probe)
        assert lease is not None
        with lease:
            yield

    def check(self) -> None:
        if not self._probe.exists():
            raise OutputError(
                f"{self.folder}: {socket.gethostname()} does not see this folder of the driver's; "
                "give --output a folder that all machines share, or a URL"
            )

    def sizes(self) -> Mapping[str, int]:
        return {path.name: path.stat().st_size for path in self.folder.iterdir() if path.is_file()}

    def local(self, name: str) -> Path:
        return self.folder / name

    def delivered(self, name: str, identity: str) -> int | None:
        return None  # the engine knows its finished videos

    def deliver(self, name: str, identity: str) -> int:
        return self.local(name).stat().st_size


@dataclass(frozen=True)
class RemoteDestination:
    """A folder of a file system that fsspec knows, filled from a local staging folder."""

    url: str
    staging: Path
    tries: int = 5
    wait_s: float = 1.0

    @contextmanager
    def prepared(self) -> Iterator[None]:
        system, root = self._open()
        self._try("cannot make the folder", lambda: system.makedirs(root, exist_ok=True))
        check_writable(self.staging)
        yield

    def check(self) -> None:
        check_writable(self.staging)
        self._open()

    def sizes(self) -> Mapping[str, int]:
        system, root = self._open()
        entries = self._try("cannot be listed", lambda: system.ls(root, detail=True))
        return {entry["name"].rsplit("/", 1)[-1]: entry["size"] or 0 for entry in entries}

    def local(self, name: str) -> Path:
        return self.staging / name

    def delivered(self, name: str, identity: str) -> int | None:
        try:
            receipt = json.loads(self._receipt(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if receipt.get("identity") != identity:
            return None
        size: int = receipt["bytes"]
        return size if self.sizes().get(name) == size else None

    def deliver(self, name: str, identity: str) -> int:
        system, root = self._open()
        video = self.local(name)
        sidecar = video.with_suffix(".json")
        size = video.stat().st_size
        for path in (video, sidecar):
            self._try(f"{path.name} cannot be delivered", partial(self._upload, system, root, path))
        atomic_write_json(self._receipt(name), {"identity": identity, "bytes": size})
        for path in (video, sidecar):
            path.unlink()
        return size

    def _upload(self, system: Any, root: str, path: Path) -> None:
        target = f"{root}/{path.name}"
        part = f"{root}/.{path.name}.{secrets.token_hex(4)}.part"
        try:
            system.put_file(str(path), part)
            system.invalidate_cache()
            there, here = system.info(part)["size"], path.stat().st_size
            if there != here:
                raise OSError(f"{there} of {here} bytes arrived")
            system.mv(part, target)
        except Exception:
            _forget(system, part)
            raise

    def _try(self, what: str, action: Callable[[], Any]) -> Any:
        """The result of `action`, tried again with growing pauses; backends raise errors of every kind."""
        for attempt in range(self.tries):
            try:
                return action()
            except Exception as error:
                if attempt + 1 == self.tries:
                    raise OutputError(
                        f"{self.url}: {what} ({type(error).__name__}: {error}), {self.tries} tries; "
                        "check the connection and the rights, then give the same command again"
                    ) from error
                time.sleep(self.wait_s * 2**attempt)

    def _open(self) -> tuple[Any, str]:
        """The file system and the folder's path in it."""
        try:
            import fsspec
        except ImportError:
            raise ResourceError(
                f"--output {self.url}: the package fsspec is missing; pip install 'omniavatar[batch]'"
            ) from None
        try:
            system, root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"--output {self.url}: {error}") from None
        return system, str(root).rstrip("/")

    def _receipt(self, name: str) -> Path:
        return self.staging / f"{name}.delivered"


def _forget(system: Any, part: str) -> None:
    """Remove what a failed upload may have left; if even that fails, the name says that it is a part."""
    try:
        system.rm_file(part)
    except Exception:
        return


def make_destination(output: str, staging: Path) -> Destination:
    """The destination called `output`: a URL (`s3://bucket/folder`) or a folder."""
    if "://" in output:
        return RemoteDestination(output, staging)
    return FolderDestination(Path(output).expanduser())
