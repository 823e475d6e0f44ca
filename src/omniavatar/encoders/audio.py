"""Computes one feature vector of speech per video frame, with wav2vec 2.0 as OmniAvatar uses it.

The waveform (16 kHz mono) is normalised over its whole length, zero-padded to the frames of all windows and
encoded once. The vector of a frame is the last hidden state followed by every hidden state; the first of
these is taken after the positional convolution and its norm (base model: 14 x 768 = 10752 numbers).
`wav2vec_spans` processes long audio in spans; weights and modules are those of transformers'
`Wav2Vec2Model`.

Limits: only the base architecture (group norm in front, norms after each layer), no adapter. The result is
float32 for every dtype of the weights. Convolutions run without TF32, so GPU and CPU give the same features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from omniavatar.checkpoint.initial import fill_random
from omniavatar.checkpoint.outside import fitting, read_table, shown
from omniavatar.checkpoint.reader import TensorFiles
from omniavatar.checkpoint.strict import file_sources, load_strict
from omniavatar.encoders.row_files import ColumnWriter, features_file
from omniavatar.encoders.wav2vec_spans import FrontEnd, NormalisedWaveform, SpanEncoder, SpanPlan
from omniavatar.errors import CheckpointError, InputError, ResumeError
from omniavatar.sampling.windows import frames_for

if TYPE_CHECKING:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

SAMPLE_RATE = 16000
SPAN_SECONDS = 30
CPU_KV_BYTES = 32 * 2**20
CUDA_KV_BYTES = 512 * 2**20
CONFIG_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "layer_norm_eps", "conv_dim", "conv_kernel", "conv_stride", "conv_bias", "num_feat_extract_layers",
    "feat_extract_activation", "num_conv_pos_embeddings", "num_conv_pos_embedding_groups",
)  # fmt: skip
ACTIVATIONS = ("gelu", "relu", "selu", "gelu_new")
LISTS = ("conv_dim", "conv_kernel", "conv_stride")
COUNTS = ("num_hidden_layers", "num_feat_extract_layers", "conv_kernel", "conv_stride")
MAX_LAYERS, MAX_WIDTH = 256, 65536
BASE_FORM = {"feat_extract_norm": "group", "do_stable_layer_norm": False, "add_adapter": False}
POSITION_WEIGHT = "encoder.pos_conv_embed.conv."
RENAMED = {
    POSITION_WEIGHT + "weight_g": POSITION_WEIGHT + "parametrizations.weight.original0",
    POSITION_WEIGHT + "weight_v": POSITION_WEIGHT + "parametrizations.weight.original1",
}
TRAINING_ONLY = ("lm_head.weight", "lm_head.bias", "masked_spec_embed")


def library_key(key: str) -> str | None:
    """The name in transformers' `Wav2Vec2Model` of a key in the release; None for training-only weights."""
    name = key.removeprefix("wav2vec2.")
    return None if name in TRAINING_ONLY else RENAMED.get(name, name)


def layers_width(config: Wav2Vec2Config) -> int:
    """Length of a row that has the outputs of all layers."""
    width: int = config.num_hidden_layers * config.hidden_size
    return width


class AudioEncoder:
    """wav2vec 2.0 on its device.

    - width: length D of the vector of a frame.
    - layers_width: length of a frame's row for models that work in chunks (`encoders.chunk_audio`).
    """

    def __init__(self, model: Wav2Vec2Model) -> None:
        self.model = model
        self.width: int = (model.config.num_hidden_layers + 2) * model.config.hidden_size
        self.layers_width = layers_width(model.config)

    @classmethod
    def load(
        cls, folder: Path, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> AudioEncoder:
        """The encoder from a Hugging Face folder with `config.json` and weights; every key must be used once.

        Raises `CheckpointError` if a file is missing or does not fit.
        """
        config = _read_config(Path(folder))
        with fitting(str(Path(folder) / "config.json"), "download the folder again"), torch.device("meta"):
            model = _model(config)
        with TensorFiles(folder) as files:
            sources = file_sources(files, library_key)
            load_strict(model, sources, dtype=dtype, device=device, origin=files.origin)
        return cls(_frozen(model))

    @classmethod
    def random(
        cls,
        *,
        hidden: int = 768,
        layers: int = 12,
        heads: int = 12,
        intermediate: int = 3072,
        conv_dim: int = 512,
        pos_kernel: int = 128,
        pos_groups: int = 16,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        seed: int,
    ) -> AudioEncoder:
        """An encoder with random weights, equal on every device for one `seed`; defaults: the base model."""
        fields = {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": intermediate,
            "conv_dim": [conv_dim] * 7,
            "num_conv_pos_embeddings": pos_kernel,
            "num_conv_pos_embedding_groups": pos_groups,
        }
        with torch.device("meta"):
            model = _model(fields)
        fill_random(model, dtype=torch.float32, device="cpu", seed=seed)
        return cls(_frozen(model.to(device, dtype)))

    def encode(
        self,
        waveform: np.ndarray,
        num_frames: int,
        fps: float | Fraction,
        out: Path,
        *,
        scratch: Path | None = None,
        span_seconds: float = SPAN_SECONDS,
        kv_bytes: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> np.memmap:
        """Write the features of a waveform to `out`, a `.npy` file that appears only when it is complete.

        Returns the features as a read-only memory map (num_frames, D).

        waveform: (samples,) float32 at 16 kHz, an array or a memory map.
        num_frames: at least `frames_for(samples, fps)`; frames after the audio get features of silence.
        scratch: folder for temporary files, about a sixth of the result's size; default: the folder of `out`.
        span_seconds: length of a span, which bounds the memory.
        kv_bytes: limit for the keys and values of attention (default: 32 MiB, 512 MiB on CUDA).
        on_progress: called with (finished steps, total steps).

        Raises `InputError` for unusable audio, `OutputError` if a file cannot be written.
        """
        rate = Fraction(fps)
        if waveform.ndim != 1 or not len(waveform):
            raise InputError(
                f"audio: samples must have one dimension, got shape {waveform.shape}; mix to mono"
            )
        if num_frames < frames_for(len(waveform), rate):
            raise ValueError(f"{num_frames} frames cannot hold {len(waveform)} samples at {fps} fps")
        padded = math.ceil(num_frames * SAMPLE_RATE / rate)
        config = self.model.config
        front = FrontEnd.of(tuple(config.conv_kernel), tuple(config.conv_stride))
        if padded < front.field:
            raise InputError(
                f"audio: {padded} samples are too short, the encoder needs {front.field}; give longer audio"
            )
        device = next(self.model.parameters()).device
        plan = SpanPlan(
            features=max(1, round(span_seconds * SAMPLE_RATE / front.stride)),
            frames=max(1, round(span_seconds * rate)),
            kv_bytes=kv_bytes or (CUDA_KV_BYTES if device.type == "cuda" else CPU_KV_BYTES),
        )
        work = (scratch or out.parent) / (out.name + ".scratch")
        with features_file(out) as partial:
            work.mkdir(parents=True, exist_ok=True)
            try:
                with torch.inference_mode(), exact_convolutions():
                    normalised = NormalisedWaveform(waveform, padded, plan.features * front.stride)
                    spans = SpanEncoder(self.model, normalised, num_frames, plan)
                    blocks = config.num_hidden_layers + 2
                    result = ColumnWriter(partial, num_frames, config.hidden_size, blocks)
                    spans.run(result, work, _counter(spans.steps(), on_progress))
            finally:
                work.rmdir()
        return open_features(out)


def open_features(path: Path) -> np.memmap:
    """The features in a complete file, as a read-only memory map (num_frames, D) float32.

    Raises `ResumeError` if `encode` did not write the file.
    """
    try:
        features = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ResumeError(f"{path}: damaged audio features; delete the file to compute them again") from error
    assert isinstance(features, np.memmap)
    return features


def _counter(total: int, on_progress: Callable[[int, int], None] | None) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    return step


def exact_convolutions() -> Any:
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{path}: missing; set wav2vec_path to the downloaded folder")
    config = read_table(path, "download the folder again")
    for field, expected in BASE_FORM.items():
        if config.get(field, expected) != expected:
            raise CheckpointError(
                f"{path}: {field} is {shown(repr(config[field]))}, must be {expected!r}; "
                "use wav2vec2-base-960h"
            )
    for field in CONFIG_FIELDS:
        if field in config and not _fits(field, config[field]):
            raise CheckpointError(
                f"{path}: {field} is {shown(repr(config[field]))}, which no wav2vec 2.0 has; "
                "download the folder again"
            )
    return config


def _fits(field: str, value: object) -> bool:
    """Whether a value of `config.json` has the type and the size that the field can have."""
    if field in ("hidden_act", "feat_extract_activation"):
        return value in ACTIVATIONS
    if field == "conv_bias":
        return isinstance(value, bool)
    if field == "layer_norm_eps":
        return type(value) in (int, float) and 0 < float(value) < 1  # type: ignore[arg-type]
    sizes = value if isinstance(value, list) and field in LISTS else [value]
    return 0 < len(sizes) <= MAX_LAYERS and all(
        type(size) is int and 0 < size <= (MAX_LAYERS if field in COUNTS else MAX_WIDTH) for size in sizes
    )


def _model(config: dict[str, Any]) -> Wav2Vec2Model:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    known: dict[str, Any] = {field: config[field] for field in CONFIG_FIELDS if field in config}
    settings: Wav2Vec2Config = Wav2Vec2Config(**known, mask_time_prob=0.0, mask_feature_prob=0.0)
    return Wav2Vec2Model(settings)


def _frozen(model: Wav2Vec2Model) -> Wav2Vec2Model:
    from torch.nn.utils.parametrize import remove_parametrizations

    remove_parametrizations(model.encoder.pos_conv_embed.conv, "weight")
    return model.eval().requires_grad_(False)
