"""The environment that reads faces. It is separate from ours because its numpy and protobuf are old.

`environment()` makes it once (about a minute, 900 MB) below `benchmarks/build`, which git ignores. It holds
MediaPipe (landmarks), pocketsphinx (times of phones in recordings) and matplotlib (plots).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ENVIRONMENT = HERE.parent / "build" / "faces"
PACKAGES = ("mediapipe==0.10.21", "numpy==1.26.4", "protobuf>=4.25,<5", "pocketsphinx==5.1.1", "pillow")
JFK = (
    "and so my fellow americans ask not what your country can do for you ask what you can do for your country"
)


def environment(folder: Path = ENVIRONMENT) -> Path:
    """The environment's Python; the first call makes the environment.

    Raises CalledProcessError where pip cannot install, RuntimeError for an unsupported Python.
    """
    python = folder / "bin" / "python"
    stamp = folder / ".installed"
    if stamp.exists() and stamp.read_text() == " ".join(PACKAGES):
        return python
    if not (3, 9) <= sys.version_info[:2] <= (3, 12):
        raise RuntimeError("mediapipe 0.10.21 needs Python 3.9 to 3.12; run `measure` with one of them")
    print(f"making {folder} for MediaPipe", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES]
    subprocess.run(pip, check=True)
    stamp.write_text(" ".join(PACKAGES))
    return python


def run_in_environment(words: Sequence[str | Path]) -> None:
    """Run a script with its arguments in the environment. Raises RuntimeError with its errors."""
    done = subprocess.run(
        [str(environment()), *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "GLOG_minloglevel": "3", "TF_CPP_MIN_LOG_LEVEL": "3"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{words[0]} failed:\n{done.stderr[-3000:]}")


def read_faces(videos: Sequence[Path], out: Path) -> dict[str, np.ndarray]:
    """Landmarks (T, 478, 3) of each video or picture, by the stem of its name; see `read_faces.py`.

    They are kept in `out` and computed again only for a newer video.
    """
    files = {video: out / f"{video.stem}.npy" for video in videos}
    stale = [
        video
        for video, file in files.items()
        if not file.exists() or file.stat().st_mtime < video.stat().st_mtime
    ]
    if stale:
        run_in_environment([HERE / "read_faces.py", out, *stale])
    return {video.stem: np.load(file) for video, file in files.items()}


def align_recordings(folder: Path, out: Path) -> None:
    """Write the phones of the recordings in `folder` (`training.record --align`) to `out`.

    jfk.wav is included; the folder's transcription leaves it out.
    """
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place)
        for file in folder.glob("*.wav"):
            shutil.copy(file, copy)
        text = (folder / "transcription").read_text().rstrip("\n")
        if (folder / "jfk.wav").exists() and "(jfk)" not in text:
            text += f"\n<s> {JFK} </s> (jfk)"
        (copy / "transcription").write_text(text + "\n")
        out.parent.mkdir(parents=True, exist_ok=True)
        run_in_environment(["-m", "training.record", "--align", copy, "--out", out])
