"""wav2vec 2.0 in spans: equal to one call on the whole waveform, constant memory, keys of the release."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from omniavatar.encoders.audio import AudioEncoder, library_key, open_features
from omniavatar.encoders.row_files import ColumnWriter, RowFile
from omniavatar.encoders.wav2vec_spans import FrontEnd
from omniavatar.errors import CheckpointError, InputError, OutputError, ResumeError
from omniavatar.sampling.windows import frames_for

TINY = {"hidden": 32, "layers": 2, "heads": 4, "intermediate": 48, "conv_dim": 16}


@pytest.fixture(scope="module")
def encoder() -> AudioEncoder:
    made = AudioEncoder.random(**TINY, device="cpu", seed=3)
    with torch.no_grad():
        for layer in made.model.encoder.layers:
            layer.attention.q_proj.weight.mul_(3)
    return made


def speech(samples: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(samples)
    loudness = np.sin(np.arange(samples) / 3000) ** 2
    return (0.1 + 0.3 * noise * loudness).astype(np.float32)


@torch.inference_mode()
def slow_twin(encoder: AudioEncoder, waveform: np.ndarray, frames: int, fps: int | Fraction) -> torch.Tensor:
    """Features of the whole waveform at once, from the modules of transformers."""
    model = encoder.model
    values = (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)
    padded = np.zeros(math.ceil(frames * 16000 / Fraction(fps)), np.float32)
    padded[: len(values)] = values
    features = model.feature_extractor(torch.from_numpy(padded)[None])
    features = torch.nn.functional.interpolate(features, size=frames, mode="linear", align_corners=True)
    states: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        for layer in model.encoder.layers
    ]
    last = model.encoder(model.feature_projection(features.transpose(1, 2))[0]).last_hidden_state
    for hook in hooks:
        hook.remove()
    return torch.cat([last, *states, last], dim=2)[0]


def relative_error(features: np.ndarray, expected: torch.Tensor) -> float:
    return float((torch.from_numpy(np.array(features)) - expected).abs().max() / expected.abs().max())


@given(
    samples=st.integers(400, 30000),
    fps=st.sampled_from([25, 30, 16, Fraction(30000, 1001), 24]),
    extra=st.integers(0, 30),
    span_seconds=st.sampled_from([0.1, 0.27, 0.5, 30]),
    kv_bytes=st.sampled_from([1, 20000, None]),
)
@settings(max_examples=25, deadline=None)
def test_spans_equal_the_whole(
    encoder: AudioEncoder,
    tmp_path_factory: pytest.TempPathFactory,
    samples: int,
    fps: int | Fraction,
    extra: int,
    span_seconds: float,
    kv_bytes: int | None,
) -> None:
    waveform = speech(samples)
    frames = frames_for(samples, fps) + extra
    out = tmp_path_factory.mktemp("features") / "audio.npy"
    if math.ceil(frames * 16000 / Fraction(fps)) < 400:
        return
    features = encoder.encode(waveform, frames, fps, out, span_seconds=span_seconds, kv_bytes=kv_bytes)
    assert features.shape == (frames, encoder.width)
    assert relative_error(features, slow_twin(encoder, waveform, frames, fps)) < 1e-4
    assert [path.name for path in out.parent.iterdir()] == ["audio.npy"]


def test_three_kinds_of_input_and_progress(encoder: AudioEncoder, tmp_path: Path) -> None:
    """An array, a memory map and a slice of one give the same bytes; progress ends at the reported total."""
    waveform = speech(20000)
    (tmp_path / "sound").write_bytes(waveform.tobytes())
    mapped = np.memmap(tmp_path / "sound", np.float32, "r")
    seen: list[tuple[int, int]] = []
    results = [
        encoder.encode(
            values, 40, 25, tmp_path / f"{name}.npy", span_seconds=0.3, on_progress=progress
        ).tobytes()
        for name, values, progress in (
            ("array", waveform, lambda done, total: seen.append((done, total))),
            ("mapped", mapped, None),
            ("slice", np.concatenate([[9.0], waveform]).astype(np.float32)[1:], None),
        )
    ]
    assert results[0] == results[1] == results[2]
    assert [done for done, _ in seen] == list(range(1, seen[0][1] + 1))
    assert open_features(tmp_path / "array.npy").tobytes() == results[0]


def test_padded_frames_are_not_zero_and_silence_is_finite(encoder: AudioEncoder, tmp_path: Path) -> None:
    features = encoder.encode(speech(1600), 30, 25, tmp_path / "short.npy")
    assert (np.abs(features[3:]).max(axis=1) > 0.1).all()
    silent = encoder.encode(np.zeros(1600, np.float32), 5, 25, tmp_path / "silent.npy")
    assert np.isfinite(silent).all()


def test_normalisation_is_over_the_audio_not_the_padding(encoder: AudioEncoder, tmp_path: Path) -> None:
    quiet, loud = (
        encoder.encode(speech(9600) * gain + offset, 60, 25, tmp_path / f"{gain}.npy")
        for gain, offset in ((0.5, 0.2), (8.0, -1.0))
    )
    assert np.abs(quiet - loud).max() < 1e-3 * np.abs(loud).max()


def test_frame_count_has_no_rounding_error() -> None:
    """In floats, samples/16000*fps gives one frame too many for these lengths."""
    faulty = [k for k in range(1, 2000) if math.ceil(k * 640 / 16000 * 25) != k]
    assert faulty
    assert all(frames_for(k * 640, 25) == k for k in faulty)


def test_wrong_audio_is_refused_and_leaves_nothing(encoder: AudioEncoder, tmp_path: Path) -> None:
    out = tmp_path / "a.npy"
    with pytest.raises(InputError, match="not finite"):
        encoder.encode(np.full(3000, np.nan, np.float32), 5, 25, out)
    with pytest.raises(InputError, match="shape"):
        encoder.encode(np.zeros((2, 3000), np.float32), 5, 25, out)
    with pytest.raises(InputError, match="too short"):
        encoder.encode(np.zeros(10, np.float32), 1, 60, out)
    with pytest.raises(ValueError, match="cannot hold"):
        encoder.encode(np.zeros(16000, np.float32), 24, 25, out)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_no_result(encoder: AudioEncoder, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise Stop

    with pytest.raises(Stop):
        encoder.encode(speech(16000), 25, 25, tmp_path / "a.npy", on_progress=stop, span_seconds=0.2)
    assert not list(tmp_path.iterdir())


def test_full_disk_is_one_clear_line(
    encoder: AudioEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=r"a\.npy.*No space left"):
        encoder.encode(speech(16000), 25, 25, tmp_path / "a.npy")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        encoder.encode(speech(16000), 25, 25, tmp_path / "file" / "a.npy")


def test_random_encoder_depends_on_the_seed_alone() -> None:
    one, same, other = (AudioEncoder.random(**TINY, device="cpu", seed=seed) for seed in (1, 1, 2))
    first = one.model.encoder.layers[0].attention.q_proj.weight
    assert torch.equal(first, same.model.encoder.layers[0].attention.q_proj.weight)
    assert not torch.equal(first, other.model.encoder.layers[0].attention.q_proj.weight)


@pytest.mark.parametrize(
    ("released", "library"),
    [
        ("wav2vec2.encoder.layers.0.layer_norm.bias", "encoder.layers.0.layer_norm.bias"),
        ("encoder.layer_norm.bias", "encoder.layer_norm.bias"),
        (
            "wav2vec2.encoder.pos_conv_embed.conv.weight_g",
            "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
        ),
        (
            "encoder.pos_conv_embed.conv.weight_v",
            "encoder.pos_conv_embed.conv.parametrizations.weight.original1",
        ),
        ("wav2vec2.masked_spec_embed", None),
        ("lm_head.weight", None),
    ],
)
def test_key_names(released: str, library: str | None) -> None:
    assert library_key(released) == library


def released_folder(folder: Path, **changes: object) -> dict[str, torch.Tensor]:
    """A tiny wav2vec folder with the released key names; returns its tensors."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=[16] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    tensors = {}
    for key, value in Wav2Vec2Model(config).state_dict().items():
        for library, released in names.items():
            key = key.replace(library, released)
        tensors["wav2vec2." + key] = value.contiguous()
    tensors["lm_head.weight"], tensors["lm_head.bias"] = torch.zeros(32, 24), torch.zeros(32)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | changes))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_load_is_strict(tmp_path: Path) -> None:
    tensors = released_folder(tmp_path)
    loaded = AudioEncoder.load(tmp_path, "cpu")
    key = "encoder.layers.0.attention.k_proj.weight"
    assert torch.equal(loaded.model.state_dict()[key], tensors["wav2vec2." + key])
    assert loaded.width == 3 * 24
    missing = dict(tensors)
    del missing["wav2vec2." + key]
    save_file(missing, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: encoder\.layers\.0\.attention\.k_proj\.weight"):
        AudioEncoder.load(tmp_path, "cpu")
    save_file(tensors | {"quantizer.codevectors": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unexpected: quantizer\.codevectors"):
        AudioEncoder.load(tmp_path, "cpu")


def test_unfit_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        AudioEncoder.load(tmp_path, "cpu")
    released_folder(tmp_path, feat_extract_norm="layer")
    with pytest.raises(CheckpointError, match="feat_extract_norm is 'layer'"):
        AudioEncoder.load(tmp_path, "cpu")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must be a JSON object"):
        AudioEncoder.load(tmp_path, "cpu")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        AudioEncoder.load(tmp_path, "cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "24"},
        {"hidden_size": 0},
        {"hidden_size": 2**40},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 7},
        {"conv_dim": None},
        {"conv_dim": [16] * 10**5},
        {"conv_stride": [5, 2, 2, 2, 2, 2]},
        {"conv_kernel": [[10], 3, 3, 3, 3, 2, 2]},
        {"conv_kernel": [-10, 3, 3, 3, 3, 2, 2]},
        {"hidden_act": "os.system"},
        {"hidden_act": ["gelu"]},
        {"layer_norm_eps": "1e-5"},
        {"layer_norm_eps": float("nan")},
        {"conv_bias": 0.5},
        {"num_feat_extract_layers": True},
    ],
    ids=str,
)
def test_settings_that_no_wav2vec_has(tmp_path: Path, changes: dict[str, object]) -> None:
    released_folder(tmp_path, **changes)
    with pytest.raises(CheckpointError) as caught:
        AudioEncoder.load(tmp_path, "cpu")
    assert "\n" not in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)
    assert len(str(caught.value)) < 600


def test_deep_settings(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": ' + "[" * 5000)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        AudioEncoder.load(tmp_path, "cpu")


def test_the_synthetic_folder_loads(nano_checkpoint: Path) -> None:
    (folder,) = nano_checkpoint.rglob("wav2vec2-base-960h")
    assert AudioEncoder.load(folder, "cpu").width == 4 * 64


def test_damaged_features_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((100, 8), np.float32))
    for size in (1000, 20, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ResumeError, match=r"a\.npy: damaged"):
            open_features(path)


def test_front_end_geometry() -> None:
    front = FrontEnd.of((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2))
    assert (front.field, front.stride) == (400, 320)
    assert [front.features(n) for n in (399, 400, 719, 720, 32000)] == [0, 1, 1, 2, 99]


def test_row_files_return_the_written_values(tmp_path: Path) -> None:
    values = torch.randn(7, 3)
    with RowFile(tmp_path / "rows", 7, 3) as rows:
        rows.write(4, values[4:])
        rows.write(0, values[:4])
        assert torch.equal(rows.read(2, 6), values[2:6])
    assert not (tmp_path / "rows").exists()
    columns = ColumnWriter(tmp_path / "c.npy", 7, 3, 2)
    columns.write(1, 2, values[2:])
    assert torch.equal(columns.read(1, 3, 5), values[3:5])
    whole = np.load(tmp_path / "c.npy")
    assert whole.shape == (7, 6) and not whole[:, :3].any() and not whole[:2].any()


PEAK = """
import re, sys
from pathlib import Path
import numpy as np
from omniavatar.encoders.audio import AudioEncoder
def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
folder = Path(sys.argv[1])
sizes = {"hidden": 64, "layers": 2, "heads": 4, "intermediate": 128, "conv_dim": 32}
encoder = AudioEncoder.random(**sizes, device="cpu", seed=0)
encoder.encode(np.zeros(16000, np.float32), 25, 25, folder / "warm.npy")
for seconds in (25, 250):
    with (folder / "sound").open("wb") as sound:
        for second in range(seconds):
            sound.write(np.sin(np.arange(16000) * 0.1 * (1 + second % 5)).astype(np.float32).tobytes())
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    sound = np.memmap(folder / "sound", np.float32, "r")
    encoder.encode(sound, seconds * 25, 25, folder / "out.npy", span_seconds=10, kv_bytes=2**20)
    print(before, memory("VmHWM"))
    del sound
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux's /proc")
def test_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    """Ten times the audio needs at most 10 % more memory, less than the waveform or the result.

    glibc adapts its thresholds to earlier frees and keeps 6 MB more or less from run to run. With fixed
    thresholds it releases every large block, so the measured memory is the memory in use.
    """
    fixed = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, env=fixed, check=True, capture_output=True, text=True)
    used, peak = {}, {}
    for seconds, line in zip((25, 250), done.stdout.splitlines(), strict=True):
        before, peak[seconds] = map(float, line.split())
        used[seconds] = peak[seconds] - before
    assert used[25] > 5
    assert peak[250] <= 1.1 * peak[25]
    waveform, result = 250 * 16000 * 4 / 2**20, 250 * 25 * 4 * 64 * 4 / 2**20
    assert used[250] - used[25] < min(waveform, result), (used, waveform, result)
