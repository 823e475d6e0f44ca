"""Downloads the released files from the Hugging Face hub to the paths in the configurations.

Only files that the engine reads are downloaded. The hub client skips finished files and continues partial
ones, so the same command resumes. The free disk space is checked first. At the end every weight file is
opened once, so that a damaged download is found here and not in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniavatar.checkpoint.layout import FLASHHEAD, TOKEN_FAMILIES, ScaleSpec, checkpoint_spec
from omniavatar.checkpoint.layout_families import LEAPTALK, TINY, family_layout, side_files
from omniavatar.checkpoint.layout_files import (
    ADAPTER,
    DIT_STEM,
    MERGED_DIT,
    TEXT_ENCODER,
    TOKENIZER,
    VAE,
    WAV2VEC,
    adapter_folder,
    base_folder,
    checkpoint_layout,
    dit_paths,
)
from omniavatar.checkpoint.reader import PathLike, TensorFiles
from omniavatar.checkpoint.synthetic import require_space
from omniavatar.errors import ConfigError, OutputError, ResourceError

APACHE = "Apache-2.0"
LIVETALK_LICENCE = f"{APACHE}, check the source"
MARGIN_BYTES = 500_000_000
Snapshot = Callable[..., Any]


@dataclass(frozen=True)
class HubFolder:
    """One repository of the hub, its target folder, and the patterns of the files to download.

    - licence: as its model card states it.
    """

    repository: str
    folder: str
    patterns: tuple[str, ...]
    licence: str


def hub_folders(spec: ScaleSpec) -> tuple[HubFolder, ...]:
    """The repositories of a released checkpoint."""
    speech = HubFolder(
        f"facebook/{WAV2VEC}",
        WAV2VEC,
        ("model.safetensors", "config.json", "preprocessor_config.json"),
        APACHE,
    )
    if spec.family in TOKEN_FAMILIES:
        paths = [layout.path for layout in family_layout(spec)] + list(side_files(spec))
        pro = _patterns(paths, FLASHHEAD)
        folders = [HubFolder(f"Soul-AILab/{FLASHHEAD}", FLASHHEAD, pro, APACHE)]
        if spec.family == "leaptalk":
            licence = f"{APACHE}; {Path(TINY).name}: MIT"
            folders.append(HubFolder("z-rx/leaptalk", LEAPTALK, _patterns(paths, LEAPTALK), licence))
        return (*folders, speech)
    base, adapter = base_folder(spec), adapter_folder(spec)
    encoders = (TEXT_ENCODER, VAE, f"{TOKENIZER}/*", "LICENSE*")
    if spec.merged:
        dit = (
            HubFolder(f"Wan-AI/{base}", base, encoders, APACHE),
            HubFolder(f"GAIR/{spec.merged}", spec.merged, (MERGED_DIT, "LICENSE*"), LIVETALK_LICENCE),
        )
    else:
        dit = (
            HubFolder(f"Wan-AI/{base}", base, ("config.json", f"{DIT_STEM}*", *encoders), APACHE),
            HubFolder(f"OmniAvatar/{adapter}", adapter, ("config.json", ADAPTER, "LICENSE*"), APACHE),
        )
    return (*dit, speech)


def _patterns(paths: Sequence[str], folder: str) -> tuple[str, ...]:
    """The files of `paths` in a folder, without it, and the licence."""
    return (*(path.removeprefix(f"{folder}/") for path in paths if path.startswith(f"{folder}/")), "LICENSE*")


def download(
    scale: str,
    root: PathLike = "pretrained_models",
    *,
    snapshot: Snapshot | None = None,
    spec: ScaleSpec | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Download the files of `scale` ('14B', 'livetalk', 'flashhead', ...) below `root` and return `root`.

    report: called with a line for each repository, which has its licence.
    snapshot: replaces `huggingface_hub.snapshot_download`.
    spec: the files to expect; None for those of the release.

    Raises ConfigError for a scale without release, OutputError if the disk is too small or read-only,
    ResourceError if the hub is unreachable or refuses, CheckpointError if a file is damaged.
    """
    spec = spec or checkpoint_spec(scale)
    if scale.endswith("nano"):
        raise ConfigError(
            f"scale: {scale} is not on the hub; run `omniavatar make-checkpoint --scale {scale}` to make one"
        )
    target = Path(root)
    folders = hub_folders(spec)
    total = sum(layout.num_bytes for layout in checkpoint_layout(spec))
    present = sum(_size(target / hub.folder) for hub in folders)
    require_space(target, max(0, total - present) + MARGIN_BYTES, f"the download of {scale}")
    for hub in folders:
        report(f"{hub.repository}: licence {hub.licence}")
        _fetch(hub, target, snapshot)
    _verify(spec, target)
    return target


def _fetch(hub: HubFolder, root: Path, snapshot: Snapshot | None) -> None:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ResourceError(
            f"download: the package {error.name} is missing; pip install huggingface_hub"
        ) from None
    fetch = snapshot_download if snapshot is None else snapshot
    where = f"https://huggingface.co/{hub.repository}"
    # The bases are OSError and the error class of the HTTP client, which depends on the version of the hub.
    any_failure: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
    try:
        fetch(repo_id=hub.repository, local_dir=root / hub.folder, allow_patterns=list(hub.patterns))
    except HfHubHTTPError as error:
        raise ResourceError(f"{where}: {_refusal(getattr(error.response, 'status_code', None))}") from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise _unreachable(where) from error
    except any_failure as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise OutputError(
                f"{root / hub.folder}: cannot be written ({error.strerror}); check the disk and permissions"
            ) from error
        raise _unreachable(where) from error


def _refusal(status: int | None) -> str:
    return {
        401: "does not exist or needs a login; run `hf auth login`",
        403: "access refused; accept its licence in the browser, then run `hf auth login`",
        404: "does not exist or was renamed; update omniavatar",
    }.get(status or 0, f"the hub answered with status {status}; run the same command again later")


def _unreachable(where: str) -> ResourceError:
    return ResourceError(f"{where}: cannot be reached; check the network and run the same command again")


def _verify(spec: ScaleSpec, root: Path) -> None:
    """Open the header of every weight file. Raises CheckpointError if one is missing or damaged."""
    if spec.family in TOKEN_FAMILIES:
        for layout in checkpoint_layout(spec):
            TensorFiles(root / layout.path).close()
        return
    base = root / base_folder(spec)
    adapter = [] if spec.merged else [[root / adapter_folder(spec) / ADAPTER]]
    for paths in (
        [root / path for path in dit_paths(spec)],
        [base / TEXT_ENCODER],
        [base / VAE],
        *adapter,
        [root / WAV2VEC],
    ):
        TensorFiles(paths).close()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
