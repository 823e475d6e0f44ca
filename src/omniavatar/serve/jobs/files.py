"""The files of jobs: a folder for each, in a folder of this machine (or a shared one), or at an fsspec URL.

`input/` and `output/` of a job lie in the store. `work/` is where the engine makes the video, always a local
folder. With a URL, what an unfinished video needs to go on is uploaded after each window (`save_work`), so
that a worker on another machine continues it (`restore_work`).

Ids and names are checked against a pattern, so no text from outside becomes another path.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from omniavatar.config.values import expanded
from omniavatar.errors import ConfigError
from omniavatar.media.atomic import atomic_path, check_writable, sync_folder, translate_os_error
from omniavatar.serve.batch.destination import open_url, retried, upload
from omniavatar.serve.jobs.errors import FileMissingError, FileNameError, FileTooLargeError
from omniavatar.serve.jobs.records import JOB_ID

NAME = re.compile(r"(input|output|work)/[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
BLOCK = 2**20
_VIDEO, _PARTIAL = "video.mp4", "video.partial.mp4"
_FOLDER_AGE_S = 3600.0


@dataclass(frozen=True)
class JobFiles:
    """Files of all jobs. The server and the workers use equal values; it can be pickled.

    place: a folder, or a URL (`s3://bucket/folder`).
    staging: local folder for work and copies; needed with a URL.
    tries, wait_s: attempts at a URL, and the first pause between them, which doubles.
    """

    place: str
    staging: Path | None = None
    tries: int = 5
    wait_s: float = 0.5

    def __post_init__(self) -> None:
        if self.is_url and self.staging is None:
            raise ConfigError(f"files {self.place}: a URL needs a local folder for the work; set staging")

    @property
    def is_url(self) -> bool:
        return "://" in self.place

    @property
    def locks(self) -> Path:
        """Local folder of the locks of the processes that claim jobs."""
        return self._local_root / "workers"

    def check(self) -> None:
        """Raise OutputError, ConfigError or ResourceError if nothing can be written here."""
        check_writable(self._local_root)
        if self.is_url:
            system, root = self._remote
            self._retry("cannot make the folder", lambda: system.makedirs(root, exist_ok=True))

    def put(self, id: str, name: str, stream: BinaryIO, limit: int | None = None) -> int:
        """Keep the content of `stream`, whole or not at all; returns its bytes.

        Raises FileTooLargeError above `limit` bytes, FileNameError, OutputError.
        """
        path = self._local(id, name)
        with translate_os_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        size = 0
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            while block := stream.read(BLOCK):
                size += len(block)
                if limit is not None and size > limit:
                    raise FileTooLargeError(f"{name}: has more than {limit} bytes; give a smaller file")
                file.write(block)
        if self.is_url:
            self._upload(id, name, path)
        return size

    def draft(self, id: str) -> Path:
        """A new local folder for the inputs of a job that is not accepted yet.

        Until `seal`, they are not on the disk for sure. Raises FileNameError, OutputError.
        """
        folder = self._folder(id) / "input"
        with translate_os_error(folder):
            folder.mkdir(parents=True)
        return folder

    def seal(self, id: str) -> None:
        """Keep what lies in the draft as inputs of the job. Raises FileNameError, OutputError."""
        folder = self._folder(id) / "input"
        names = sorted(path.name for path in folder.iterdir())
        with translate_os_error(folder):
            for name in names:
                with (folder / name).open("rb+") as file:
                    os.fsync(file.fileno())
            sync_folder(folder)
        if self.is_url:
            for name in names:
                self._upload(id, f"input/{name}", folder / name)

    def drop_draft(self, id: str) -> None:
        """Remove a draft that is not sealed. Raises FileNameError."""
        shutil.rmtree(self._folder(id), ignore_errors=True)

    def put_file(self, id: str, name: str, source: Path) -> int:
        """Move a local file here; returns its bytes. Raises FileNameError, OutputError."""
        path = self._local(id, name)
        with translate_os_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if source != path:
                os.replace(source, path)
            size = path.stat().st_size
        if self.is_url:
            self._upload(id, name, path)
        return size

    def copy(self, id: str, name: str, to_id: str, to_name: str) -> None:
        """Copy a file to another job. Raises FileMissingError, FileNameError, OutputError."""
        with self.open(id, name) as stream:
            self.put(to_id, to_name, stream)

    def open(self, id: str, name: str) -> BinaryIO:
        """A file for reading, with `seek`. Raises FileMissingError, FileNameError, OutputError."""
        path = self._local(id, name)
        try:
            if not self.is_url:
                return path.open("rb")
            system, _ = self._remote
            target = self._target(id, name)
            if not self._retry(f"cannot look for {name}", lambda: system.exists(target)):
                raise FileNotFoundError(target)
            return cast(BinaryIO, self._retry(f"cannot open {name}", lambda: system.open(target, "rb")))
        except FileNotFoundError:
            raise FileMissingError(f"{name}: job {id} has no such file") from None

    def size(self, id: str, name: str) -> int | None:
        """Bytes of a file; None if there is none. Raises FileNameError, OutputError."""
        path = self._local(id, name)
        if not self.is_url:
            return path.stat().st_size if path.is_file() else None
        system, target = self._remote[0], self._target(id, name)

        def look() -> int | None:
            system.invalidate_cache()
            return int(system.info(target)["size"]) if system.exists(target) else None

        return cast("int | None", self._retry(f"cannot look for {name}", look))

    def local(self, id: str, name: str) -> Path:
        """A local path with the file's content; a URL is downloaded once.

        Raises FileMissingError, FileNameError, OutputError.
        """
        path = self._local(id, name)
        if path.is_file():
            return path
        if not self.is_url or self.size(id, name) is None:
            raise FileMissingError(f"{name}: job {id} has no such file")
        self._download(self._target(id, name), path)
        return path

    def work(self, id: str) -> Path:
        """The local path of the video that the engine makes; its job folder lies beside it."""
        return self._folder(id) / "work" / _VIDEO

    def partial(self, id: str) -> Path | None:
        """The growing video of an unfinished job; None if this machine has none."""
        path = self._folder(id) / "work" / _PARTIAL
        return path if path.is_file() else None

    def delete(self, id: str) -> None:
        """Remove every file of the job. Raises FileNameError, OutputError."""
        folder = self._folder(id)
        with translate_os_error(folder), suppress(FileNotFoundError):
            shutil.rmtree(folder)
        if self.is_url:
            system, root = self._remote
            path = f"{root}/{id}"

            def remove() -> None:
                system.invalidate_cache()
                if system.exists(path):
                    system.rm(path, recursive=True)

            self._retry(f"cannot delete the files of {id}", remove)

    def drop_work(self, id: str) -> None:
        """Remove the work of a job that has ended, and local copies of what lies at a URL."""
        folder = self._folder(id)
        unneeded = folder if self.is_url else folder / "work"
        with translate_os_error(unneeded), suppress(FileNotFoundError):
            shutil.rmtree(unneeded)
        if self.is_url:
            for name in self._saved(id):
                self._retry(f"cannot delete {name}", partial(self._remote[0].rm_file, self._target(id, name)))

    def ids(self, older_than_s: float = _FOLDER_AGE_S) -> Iterator[str]:
        """Ids of the folders here, those left out that changed in the last seconds."""
        latest = time.time() - older_than_s
        for folder in self._local_root.glob("video_*"):
            with suppress(FileNotFoundError):
                if JOB_ID.fullmatch(folder.name) and folder.stat().st_mtime <= latest:
                    yield folder.name
        if self.is_url:
            system, root = self._remote
            system.invalidate_cache()
            for entry in self._retry(
                "cannot list the folder", lambda: system.find(root, detail=True)
            ).items():
                path, info = entry
                found = JOB_ID.fullmatch(path.removeprefix(root).strip("/").split("/")[0])
                changed = info.get("LastModified") or info.get("mtime") or 0.0
                seconds = changed.timestamp() if hasattr(changed, "timestamp") else float(changed)
                if found and seconds <= latest:
                    yield found[0]

    # the work of an unfinished job at a URL

    def save_work(self, id: str) -> None:
        """Upload what another machine needs to go on with the job; without a URL, nothing.

        Raises OutputError.
        """
        folder = self._job_folder(id)
        if not self.is_url or not folder.is_dir():
            return
        saved = set(self._saved(id))
        kept = sorted(path.name for path in folder.glob("*") if _goes_on(path.name))
        for name in [*(name for name in kept if name != "job.json"), "job.json"]:  # which names the others
            if f"work/{name}" not in saved or name == "job.json":
                with suppress(FileNotFoundError):  # an old hand-over that is not needed any more
                    self._upload(id, f"work/{name}", folder / name)

    def restore_work(self, id: str) -> None:
        """Download the saved work of a job that this machine has not begun. Raises OutputError."""
        folder = self._job_folder(id)
        if not self.is_url or (folder / "job.json").exists():
            return
        names = self._saved(id)
        if "work/job.json" not in names:
            return
        for name in [*(name for name in names if name != "work/job.json"), "work/job.json"]:
            self._download(self._target(id, name), folder / name.removeprefix("work/"))

    def _saved(self, id: str) -> list[str]:
        """Names (`work/...`) of what `save_work` has uploaded."""
        system, root = self._remote
        path = f"{root}/{self._checked(id)}/work"

        def look() -> list[str]:
            system.invalidate_cache()
            return [found.rsplit("/", 1)[-1] for found in system.find(path)]

        found: list[str] = self._retry("cannot list the work", look)
        return [f"work/{name}" for name in found if _goes_on(name)]

    # paths

    @property
    def _local_root(self) -> Path:
        if self.is_url:
            assert self.staging is not None
            return self.staging
        return expanded(self.place, "files")

    @property
    def _remote(self) -> tuple[Any, str]:
        return open_url(self.place, f"files {self.place}")

    def _checked(self, id: str) -> str:
        if not JOB_ID.fullmatch(id):
            raise FileNameError("the id is none of a job; it looks like video_ and 32 hexadecimal digits")
        return id

    def _folder(self, id: str) -> Path:
        return self._local_root / self._checked(id)

    def _job_folder(self, id: str) -> Path:
        return self._folder(id) / "work" / f"{_VIDEO}.job"

    def _local(self, id: str, name: str) -> Path:
        folder = self._folder(id)
        if not NAME.fullmatch(name):
            raise FileNameError("the name is none of a job's file; it looks like input/portrait.png")
        return folder / name

    def _target(self, id: str, name: str) -> str:
        self._local(id, name)
        return f"{self._remote[1]}/{id}/{name}"

    def _upload(self, id: str, name: str, path: Path) -> None:
        system, target = self._remote[0], self._target(id, name)

        def send() -> None:
            system.makedirs(target.rpartition("/")[0], exist_ok=True)
            upload(system, path, target)

        self._retry(f"cannot upload {name}", send)

    def _download(self, target: str, path: Path) -> None:
        system = self._remote[0]
        with translate_os_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)

        def fetch() -> None:
            with atomic_path(path) as temporary:
                system.get_file(target, str(temporary))

        self._retry(f"cannot download {path.name}", fetch)

    def _retry(self, failure: str, action: Callable[[], Any]) -> Any:
        return retried(f"{self.place}: {failure}", action, self.tries, self.wait_s)


def _goes_on(name: str) -> bool:
    """Whether a file of the job folder is needed to go on elsewhere; sound and features are made again."""
    return name == "job.json" or re.fullmatch(r"(segment|given)_\d+\.(mp4|safetensors)", name) is not None
