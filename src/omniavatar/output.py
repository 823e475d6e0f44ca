"""Writing one video while it is made: segments, the growing file, the sidecar, output names.

`VideoWriter` waits for the device, encodes and muxes in threads of its own, two windows at a time: with few
steps on several GPUs one window takes x264 longer than the model. A window is recorded as done, in order,
only after its segment and its hand-over are on disk.
"""

from __future__ import annotations

import hashlib
import platform
import sys
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from omniavatar import __version__
from omniavatar.config.identity import result_values
from omniavatar.errors import InputError, OutputError, ResumeError
from omniavatar.job import Job, fingerprint
from omniavatar.media.atomic import atomic_write_json, check_writable
from omniavatar.media.audio import encode_aac_track
from omniavatar.media.encoders import Encoder
from omniavatar.media.slug import slugify
from omniavatar.media.video import GrowingVideo, encode_segment
from omniavatar.plan.calibration import NAME as STEP_CACHE
from omniavatar.types import AudioInput, AvatarRequest, Recorder, Waveform

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from omniavatar.config.schema import ModelConfig, OutputConfig, PipelineConfig, SamplingConfig
    from omniavatar.generation import WindowResult
    from omniavatar.plan.placement import Placement
    from omniavatar.plan.run import RunPlan
    from omniavatar.sampling.cache_constants import CacheConstants

ENCODER_THREADS = 4
"""Fixed, since x264's output depends on it and a resumed run must give the same video."""
ENCODERS = 2
"""Windows that are encoded at the same time; each is a file of its own, so the bytes are the same."""
MOST_PENDING = ENCODERS + 1
"""Windows the writer may be behind the model: those that are being encoded and one that is being computed."""
_READ_BYTES = 2**20


def output_path(output: OutputConfig, sampling: SamplingConfig, index: int, prompt: str) -> Path:
    """Where the video of request `index` of a run goes when no output name is given.

    slug: `<output_dir>/<index>_<slug>.mp4`. reference: the original's way, the sampling settings in a folder
    name and a numbered file in it.
    """
    if output.naming == "slug":
        return output.output_dir / f"{index:03d}_{slugify(prompt)}.mp4"
    settings = f"seed{sampling.seed}_step{sampling.steps}_cfg{sampling.guidance_scale:g}"
    if sampling.audio_scale is not None:
        settings += f"_audio{sampling.audio_scale:g}"
    return output.output_dir / settings / f"result_{index:03d}.mp4"


def checked_output(output: Path) -> Path:
    """`output` if a video can be written there. Raises OutputError."""
    if output.suffix.lower() != ".mp4":
        raise OutputError(f"{output}: the video is written as .mp4; give the output that ending")
    check_writable(output.parent)
    if output.is_dir():
        raise OutputError(f"{output}: is a folder; choose another output name")
    return output


def request_fingerprint(
    config: PipelineConfig,
    sampling: SamplingConfig,
    request: AvatarRequest,
    image: np.ndarray,
    constants: CacheConstants | None,
    encoder: Encoder,
    placement: Placement,
    attention: str,
) -> dict[str, str]:
    """What decides the frames of a request: configuration, weight files, inputs, package version.

    constants: those of the step cache; their numbers count, not the file they come from. encoder: what
    `output.encoder` came to; the segments of one video are all made by it. placement: what was chosen for
    the memory there is. attention: the backend that `runtime.attention` came to.
    """
    values = result_values(config.model_copy(update={"sampling": sampling}))
    del values["sampling.step_cache_file"]
    values["step cache constants"] = "none" if constants is None else constants.digest
    values["output.encoder"] = encoder
    values["runtime.attention"] = attention
    values |= placement.identity()
    values["request.prompt"] = request.prompt
    values["request.image"] = hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()
    values["request.audio"] = _audio_digest(request.audio)
    values["omniavatar"] = __version__
    return fingerprint({**values, **weight_identities(config.model)})


def weight_identities(model: ModelConfig) -> dict[str, str]:
    """Size and time of every weight file there is, as `file.<name>`."""
    named = (model.vae_path, model.decoder_path, model.text_encoder_path, model.wav2vec_path, model.exp_path)
    paths = (*model.dit_path, *named, *(lora.path for lora in model.loras))
    return {f"file.{path.name}": _file_identity(path) for path in paths if path is not None and path.exists()}


def _file_identity(path: Path) -> str:
    inside = (p for p in path.rglob("*") if p.is_file() and p.name != STEP_CACHE)
    files = sorted(inside) if path.is_dir() else [path]
    return "; ".join(f"{p.stat().st_size} bytes, modified {p.stat().st_mtime_ns}" for p in files)


def _audio_digest(audio: AudioInput | None) -> str:
    if audio is None:
        return "none"
    digest = hashlib.sha256()
    if isinstance(audio, Waveform):
        digest.update(str(audio.sample_rate).encode())
        digest.update(np.ascontiguousarray(audio.samples).tobytes())
        return digest.hexdigest()
    try:
        with Path(audio).open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise InputError(f"audio {audio}: cannot be read ({error.strerror}); check the path") from None
    return digest.hexdigest()


class VideoWriter:
    """Encodes finished windows and appends them to the growing video, in order, behind the model's back.

    A context manager: leaving it waits for the windows handed over, and leaves everything on disk.
    """

    def __init__(
        self,
        job: Job,
        plan: RunPlan,
        output: OutputConfig,
        audio: AudioInput | None,
        audio_delay_s: Fraction,
        recorder: Recorder,
        encoder: Encoder,
    ) -> None:
        self._encoder = encoder
        self._job, self._plan, self._output, self._recorder = job, plan, output, recorder
        self._fps = Fraction(plan.fps)
        track: Path | None = None
        if audio is not None:
            track = job.folder / "sound.mp4"
            with recorder.stage("audio_encode"):
                encode_aac_track(audio, track, audio_delay_s, plan.frames / self._fps)
        self._growing = GrowingVideo(job.partial, job.output, self._fps, track)
        self._pool = ThreadPoolExecutor(ENCODERS, thread_name_prefix="video-writer")
        self._pending: deque[Future[bool]] = deque()
        self._before: Future[bool] | None = None
        self._arrived = 0.0
        for index in range(job.done):
            segment = job.segment_path(index)
            if not segment.is_file():
                raise ResumeError(f"{segment} is missing; use --no-resume to start over")
            self._growing.append(segment)

    def submit(self, result: WindowResult, begun: float) -> None:
        """Hand over a window that may still be computed; waits while `MOST_PENDING` are not written.

        begun: `time.perf_counter()` at the start of the first window. Raises what went wrong with a window
        before; none is written after one that failed.
        """
        while self._pending and (len(self._pending) >= MOST_PENDING or self._pending[0].done()):
            self._pending.popleft().result()
        self._before = self._pool.submit(self._write, result, begun, self._before)
        self._pending.append(self._before)

    def finish(self) -> None:
        """Wait for the last window and give the video its final name."""
        while self._pending:
            self._pending.popleft().result()
        with self._recorder.stage("video_finish"):
            self._growing.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        self._growing.close()

    def _write(self, result: WindowResult, begun: float, before: Future[bool] | None) -> bool:
        """Encode a window and, after the one `before` it, append it; whether both were done."""
        frames, given = result.frames, result.next_given
        arrived = time.perf_counter()
        window = result.window
        with self._recorder.stage("video_write"):
            encode_segment(
                iter(frames),
                self._job.segment_path(window.index),
                fps=self._fps,
                size=self._plan.size,
                crf=self._output.crf,
                preset=self._output.preset,
                threads=ENCODER_THREADS,
                encoder=self._encoder,
            )
        if before is not None and (before.exception() is not None or not before.result()):
            return False
        seconds = arrived - max(begun, self._arrived)
        self._arrived = arrived
        with self._recorder.stage("video_append"):
            self._job.finish_window(None if given is None else safetensors.torch.save({"given": given}))
            self._growing.append(self._job.segment_path(window.index))
        self._recorder.event(
            "window_finished",
            window=window.index,
            windows=len(self._plan.windows),
            frames_done=window.first_new_frame + window.new_frames,
            seconds=seconds,
        )
        return True


def load_given(path: Path) -> Tensor:
    """Given latents left by the window before. Raises ResumeError when they are gone."""
    if not path.is_file():
        raise ResumeError(f"{path} is missing; use --no-resume to start over")
    try:
        return safetensors.torch.load_file(path)["given"]
    except SafetensorError as error:
        raise ResumeError(f"{path} is damaged ({error}); use --no-resume to start over") from None


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Most memory this process has held so far, bytes; `peak_gpu_bytes` is None without CUDA."""
    unit = 1 if sys.platform == "darwin" else 1024
    on_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else None
    return {"peak_gpu_bytes": on_gpu, "peak_host_bytes": host}


def write_sidecar(job: Job, values: dict[str, Any]) -> None:
    """The JSON beside the video: everything needed to know how it was made, and to make it again."""
    versions = {
        "omniavatar": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }
    atomic_write_json(job.sidecar, {**values, "versions": versions, "platform": platform.platform()})
