"""Download: the right files at the official paths, and a clear error for each kind of failure."""

from __future__ import annotations

import fnmatch
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from omniavatar.checkpoint.download import download, hub_folders
from omniavatar.checkpoint.layout import checkpoint_spec, scale_spec
from omniavatar.checkpoint.layout_files import checkpoint_layout
from omniavatar.checkpoint.synthetic import make_checkpoint
from omniavatar.config.load import load_config
from omniavatar.errors import CheckpointError, ConfigError, OmniAvatarError, OutputError, ResourceError

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.fixture(autouse=True)
def roomy_disk(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10**12))


def test_repositories_and_patterns_cover_the_layout():
    for scale in ("1.3B", "14B"):
        folders = {hub.folder: hub for hub in hub_folders(scale_spec(scale))}
        assert {hub.repository for hub in folders.values()} == {
            f"Wan-AI/Wan2.1-T2V-{scale}",
            f"OmniAvatar/OmniAvatar-{scale}",
            "facebook/wav2vec2-base-960h",
        }
        tokenizer = f"Wan2.1-T2V-{scale}/google/umt5-xxl/tokenizer.json"
        for path in (*(layout.path for layout in checkpoint_layout(scale_spec(scale))), tokenizer):
            folder, _, name = path.partition("/")
            assert any(fnmatch.fnmatch(name, pattern) for pattern in folders[folder].patterns), path
        base = folders[f"Wan2.1-T2V-{scale}"].patterns
        assert not any(fnmatch.fnmatch("assets/video.mp4", pattern) for pattern in base)


def test_a_merged_model_needs_its_own_file_and_the_encoders():
    spec = checkpoint_spec("livetalk")
    folders = {hub.folder: hub for hub in hub_folders(spec)}
    assert folders["LiveTalk-1.3B-V0.1"].repository == "GAIR/LiveTalk-1.3B-V0.1"
    assert set(folders) == {"Wan2.1-T2V-1.3B", "LiveTalk-1.3B-V0.1", "wav2vec2-base-960h"}
    for path in (layout.path for layout in checkpoint_layout(spec)):
        folder, _, name = path.partition("/")
        assert any(fnmatch.fnmatch(name, pattern) for pattern in folders[folder].patterns), path
    base = folders["Wan2.1-T2V-1.3B"].patterns
    assert not any(fnmatch.fnmatch("diffusion_pytorch_model.safetensors", pattern) for pattern in base)
    config = load_config(CONFIGS / "livetalk.yaml").config.model
    layout = {f"pretrained_models/{each.path}" for each in checkpoint_layout(spec)}
    named = {str(path) for path in (*config.dit_path, config.vae_path, config.text_encoder_path)}
    assert named <= layout


def released(tmp_path, name="nano"):
    """The nano model, whose sizes stand for those of the released 1.3B files."""
    source = make_checkpoint(name, tmp_path / "hub")

    def snapshot(*, repo_id: str, local_dir: Path, allow_patterns: list[str]) -> None:
        for path in (source / local_dir.name).rglob("*"):
            name = str(path.relative_to(source / local_dir.name))
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
                (local_dir / name).write_bytes(path.read_bytes())

    return source, snapshot


@pytest.mark.parametrize("name", ["nano", "livetalk-nano", "leaptalk-nano"])
def test_what_arrives_is_a_complete_checkpoint(tmp_path, name):
    source, snapshot = released(tmp_path, name)
    lines: list[str] = []
    spec = checkpoint_spec(name)
    root = download("1.3B", tmp_path / "models", snapshot=snapshot, spec=spec, report=lines.append)
    assert [line.partition(":")[0] for line in lines] == [hub.repository for hub in hub_folders(spec)]
    assert all("Apache-2.0" in line for line in lines)
    names = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} == names


def test_damaged_arrival_is_noticed(tmp_path):
    source, snapshot = released(tmp_path)
    vae = source / "Wan2.1-T2V-nano" / "Wan2.1_VAE.pth"
    vae.write_bytes(vae.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"Wan2\.1_VAE\.pth: damaged"):
        download("1.3B", tmp_path / "models", snapshot=snapshot, spec=scale_spec("nano"))
    vae.unlink()
    with pytest.raises(CheckpointError, match=r"Wan2\.1_VAE\.pth"):
        download("1.3B", tmp_path / "other", snapshot=snapshot, spec=scale_spec("nano"))


def test_disk_check_comes_first_and_counts_downloaded_files(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10**10))

    def never(**arguments: object) -> None:
        raise AssertionError("fetched")

    with pytest.raises(
        OutputError, match=r"the download of 14B needs 72\.4 GB, but the disk has 10\.0 GB free"
    ):
        download("14B", tmp_path, snapshot=never)
    (tmp_path / "Wan2.1-T2V-14B").mkdir()
    with (tmp_path / "Wan2.1-T2V-14B" / "part").open("wb") as file:
        file.truncate(65 * 10**9)
    with pytest.raises(AssertionError, match="fetched"):
        download("14B", tmp_path, snapshot=never)


def hub_error(status: int) -> Exception:
    from types import SimpleNamespace

    from huggingface_hub.errors import HfHubHTTPError

    error = HfHubHTTPError.__new__(HfHubHTTPError)
    Exception.__init__(error, f"status {status}")
    error.response = SimpleNamespace(status_code=status)
    return error


def transport_error() -> Exception:
    """The error of the hub's HTTP client for a broken connection, which is not an OSError."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]("connection reset")


def not_found_locally() -> Exception:
    from huggingface_hub.errors import LocalEntryNotFoundError

    return LocalEntryNotFoundError("no network and no copy")


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: hub_error(401), ResourceError, "auth login"),
        (lambda: hub_error(403), ResourceError, "licence"),
        (lambda: hub_error(404), ResourceError, "renamed"),
        (lambda: hub_error(503), ResourceError, "503"),
        (transport_error, ResourceError, "network"),
        (not_found_locally, ResourceError, "network"),
        (lambda: ConnectionError("offline"), ResourceError, "network"),
        (lambda: OSError(28, "No space left on device"), OutputError, "No space left"),
    ],
)
def test_failures(make, kind: type[OmniAvatarError], text, tmp_path):
    error = make()

    def snapshot(**arguments: object) -> None:
        raise error

    with pytest.raises(kind, match=text) as caught:
        download("1.3B", tmp_path, snapshot=snapshot)
    assert "\n" not in str(caught.value)
    assert "Wan2.1-T2V-1.3B" in str(caught.value)


@pytest.mark.parametrize("name", ["nano", "livetalk-nano"])
def test_nano_is_not_on_the_hub(tmp_path, name):
    with pytest.raises(ConfigError, match=f"make-checkpoint --scale {name}"):
        download(name, tmp_path)
