"""What nodes get, as an order for the engine: pictures and samples in files, names by their content."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

KEY_LETTERS = 12
CONFIGURED = -1.0
"""Value of a guidance that is left to the configuration; steps use 0."""


class InputProblem(ValueError):
    """A value of a node that cannot be used: one line with the remedy."""


@dataclass(frozen=True)
class Model:
    """What the Load node gives to the others.

    - weights: `pocket`, a folder of weights, or a YAML file.
    - scale: of the weights if a folder holds several; else empty.
    - settings: one `name=value` a line.
    - python: of the engine's process.
    - keep_loaded: whether the process goes on after a video.
    - free_memory: whether ComfyUI's own models leave the GPU before a video.
    """

    weights: str
    scale: str
    settings: str
    python: str
    keep_loaded: bool
    free_memory: bool

    def order(self) -> dict[str, str]:
        return {"weights": self.weights, "scale": self.scale, "settings": self.settings}


@dataclass(frozen=True)
class Request:
    """The request of a node. audio: (samples, channels). size: (height, width)."""

    prompt: str
    image: np.ndarray
    audio: np.ndarray | None
    rate: int
    sampling: Mapping[str, float]
    size: tuple[int, int] | None
    continues: Path | None = None

    def key(self, model: Model) -> str:
        """A name of request and model; the same inputs have the same one."""
        digest = hashlib.sha256()
        for array in (self.image, self.audio):
            digest.update(b"none" if array is None else f"{array.shape}{array.dtype}".encode())
            digest.update(b"" if array is None else np.ascontiguousarray(array))
        continues = None
        if self.continues is not None:
            stat = self.continues.stat()
            continues = [str(self.continues), stat.st_size, stat.st_mtime_ns]
        values = [self.prompt, self.rate, dict(self.sampling), self.size, continues, model.order()]
        digest.update(json.dumps(values, sort_keys=True).encode())
        return digest.hexdigest()[:KEY_LETTERS]

    @contextmanager
    def in_files(self) -> Iterator[dict[str, Any]]:
        """The request for an order; its files exist while the body runs."""
        with TemporaryDirectory(prefix="omniavatar-comfyui-") as name:
            folder = Path(name)
            np.save(folder / "image.npy", self.image)
            audio = None
            if self.audio is not None:
                audio = str(folder / "audio.npy")
                np.save(audio, self.audio)
            yield {
                "prompt": self.prompt,
                "image": str(folder / "image.npy"),
                "audio": audio,
                "rate": self.rate,
                "sampling": dict(self.sampling),
                "size": self.size,
                "continues": None if self.continues is None else str(self.continues),
            }


def picture(image: Any) -> np.ndarray:
    """An IMAGE (1, H, W, 3 or 4) in [0, 1] as uint8 (H, W, 3 or 4). Raises InputProblem."""
    if image.ndim != 4 or image.shape[-1] not in (3, 4):
        raise InputProblem(f"image: has the shape {tuple(image.shape)}; give an IMAGE")
    if image.shape[0] != 1:
        raise InputProblem(f"image: is a batch of {image.shape[0]}; choose one, as with ImageFromBatch")
    array = image[0].detach().cpu().float().numpy()
    return np.rint(np.clip(array, 0.0, 1.0) * 255.0).astype(np.uint8)


def sound(audio: Mapping[str, Any] | None) -> tuple[np.ndarray | None, int]:
    """An AUDIO as float32 (samples, channels) and its rate. Raises InputProblem."""
    if audio is None:
        return None, 0
    wave = audio["waveform"]
    if wave.ndim != 3 or wave.shape[0] != 1:
        raise InputProblem(f"audio: has the shape {tuple(wave.shape)}; give one sound, not a batch")
    samples = np.ascontiguousarray(wave[0].detach().cpu().float().numpy().T)
    return samples, int(audio["sample_rate"])


def sampling(seed: int, steps: int, guidance: float, audio_guidance: float) -> dict[str, float]:
    """Sampling values of a request; what is left to the configuration is left out."""
    values: dict[str, float] = {"seed": seed}
    if steps:
        values["num_steps"] = steps
    if guidance != CONFIGURED:
        values["guidance_scale"] = guidance
    if audio_guidance != CONFIGURED:
        values["audio_scale"] = audio_guidance
    return values


def size(text: str) -> tuple[int, int] | None:
    """(height, width) of `WIDTHxHEIGHT`; None for `auto`. Raises InputProblem."""
    text = text.strip().lower()
    if text in ("", "auto"):
        return None
    if not (found := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)):
        raise InputProblem(f"size: {text!r} is neither auto nor WIDTHxHEIGHT, such as 720x400")
    return int(found[2]), int(found[1])


def output_folder(root: str, name: str, key: str) -> Path:
    """The folder of a video: `root/name/key`. Raises InputProblem if the name leaves `root`."""
    if not name.strip() or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise InputProblem(f"name: {name!r} is no name below ComfyUI's output folder; take letters and /")
    return Path(root) / name / key


def resolved_weights(text: str, models: str) -> str:
    """`pocket`, or an absolute path: a relative one lies in `models/omniavatar` of ComfyUI.

    Raises InputProblem if it does not exist.
    """
    text = text.strip()
    if text == "pocket":
        return text
    path = Path(text).expanduser()
    path = path if path.is_absolute() else Path(models) / "omniavatar" / path
    if not text or not path.exists():
        raise InputProblem(
            f"weights: {path} does not exist; give pocket, a folder that `omniavatar download` wrote, "
            "or a YAML file"
        )
    return str(path)


def weights_state(weights: str) -> str:
    """Names, sizes and times of the files of weights; another value when one changes."""
    path = Path(weights)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
