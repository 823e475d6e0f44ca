"""What reads the damaged files: the functions through which files from outside come into the product."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fuzz import seeds
from media_files import tones, write_audio
from omniavatar.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[2]
TRAPS = "OMNIAVATAR_FUZZ_TRAPS"
"""Environment variable: the numbers of the inputs that are traps."""
LAYER = "blocks.0.self_attn.q.weight"


@dataclass(frozen=True)
class Target:
    """A kind of file.

    - good: contents that `read` accepts.
    - endings: of the file's name; one is drawn for each input.
    - text: whether it is text.
    - read: reads the file as the product does. Any exception but an `OmniAvatarError` is a fault.
    """

    name: str
    good: Sequence[bytes]
    endings: tuple[str, ...]
    text: bool
    read: Callable[[Path], Any]


def make_targets(folder: Path) -> dict[str, Target]:
    """Every target by name. `folder` holds the files that good inputs name."""
    write_audio(folder / "voice.wav", tones(0.2, 16000, 1), 16000, "pcm_s16le", "mono")
    pictures = seeds.pictures()
    (folder / "face.png").write_bytes(pictures[0])
    requests = seeds.request_files()
    made = [
        Target("picture", pictures, (".png", ".jpg", ".webp", ""), False, _picture),
        Target("sound", seeds.sounds(folder), (".wav", ".mp3", ".m4a", ".mka", ""), False, _sound),
        Target("safetensors", seeds.safetensors_files(), (".safetensors",), False, _tensors),
        Target("pth", seeds.torch_files(), (".pth", ".pt", ".bin"), False, _tensors),
        Target("yaml", seeds.configs(REPOSITORY), (".yaml",), True, _config),
        *(Target(f"requests{each}", good, (each,), True, _requests) for each, good in requests.items()),
        Target("calibration", [seeds.calibration()], (".json",), True, _calibration),
        Target("job", [seeds.job_state()], (".json",), True, _job),
        Target("hand_over", [seeds.hand_over()], (".safetensors",), False, _hand_over),
        Target("model_config", [seeds.MODEL_CONFIG], (".json",), True, _wav2vec),
    ]  # fmt: skip
    if TRAPS in os.environ:  # for the test of the watcher
        made.append(Target("trap", [b"x"], (".x",), False, _trap))
    return {each.name: each for each in made}


def _trap(path: Path) -> None:
    """Does what a bad decoder might do, by the number in the file, if `TRAPS` lists it."""
    number = int(path.read_bytes())
    if str(number) not in os.environ[TRAPS].split(","):
        return
    if number == 3:
        time.sleep(600)
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 8:
        held = np.ones(5 * 2**26)
        time.sleep(600 * held[0])
    if number == 11:
        print(1 // (number - 11))
    if number == 13:
        raise InputError("")


def _picture(path: Path) -> None:
    from omniavatar.media.image import load_image

    assert load_image(path).dtype == np.uint8


def _sound(path: Path) -> None:
    from omniavatar.media.audio import decode_mono, encode_aac_track

    out = path.with_name("mono.f32")
    decode_mono(path, out, 16000, 0.1)
    samples = np.fromfile(out, "<f4")
    assert np.isfinite(samples).all() and np.abs(samples).max(initial=0) <= 64
    encode_aac_track(path, path.with_name("track.mp4"), 0.1, 1.0)


def _tensors(path: Path) -> None:
    from omniavatar.checkpoint.lora import plan_lora
    from omniavatar.checkpoint.reader import TensorFiles
    from omniavatar.errors import CheckpointError

    with TensorFiles(path) as files:
        for key in files.keys():  # noqa: SIM118  (not a dict)
            assert tuple(files.load(key).shape) == files.shape(key)
        try:
            plan_lora(files, {LAYER: (8, 8)})
        except CheckpointError as error:
            if str(path) not in str(error):
                raise AssertionError(f"the message does not name the file: {error}") from None


def _config(path: Path) -> None:
    from omniavatar.config.load import load_config

    load_config(path)


def _requests(path: Path) -> None:
    from omniavatar.engine.requests_file import read_requests

    read_requests(path)


def _calibration(path: Path) -> None:
    from omniavatar.plan.calibration import read_calibration

    read_calibration(path)


def _job(path: Path) -> None:
    from omniavatar.engine.job import Job

    job = Job(path.with_name("talk.mp4"))
    job.folder.mkdir(exist_ok=True)
    (job.folder / "job.json").write_bytes(path.read_bytes())
    job.refuse_foreign()
    job.recorded(("quantize", "prompt"))
    job.open({"prompt": '"p"', "sampling.seed": "3", "quantize": '"none"'}, True)
    assert job.done >= 0


def _hand_over(path: Path) -> None:
    from omniavatar.engine.handover import load_given

    assert load_given(path, (1, 16, 2, 4, 6)).isfinite().all()


def _wav2vec(path: Path) -> None:
    from omniavatar.encoders.audio import AudioEncoder

    folder = path.with_name("wav2vec")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(path.read_bytes())
    AudioEncoder.load(folder, "cpu")
