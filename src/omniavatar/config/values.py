"""The value types of a configuration and their checks, the base of its sections, and those of signed videos.

Every check raises ValueError with a text that completes the line `<field>: ...`. Numbers are strict: true is
not 1 and "5" is not 5, but 3e4 is the whole number 30000.
"""

from __future__ import annotations

import fnmatch
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from omniavatar.errors import ConfigError
from omniavatar.sampling.schedule import timesteps_error
from omniavatar.text import quoted, surrogate_problem

IGNORED_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "reload_cfg": "the checkpoint's config.json is always read",
        "image_encoder_path": "the text-to-video base has no image encoder",
        "random_prefix_frames": "a training setting",
        "train_architecture": "the checkpoint's keys show which weights are LoRA pairs",
        "lora_target_modules": "the checkpoint's keys show which layers its LoRA changes",
        "i2v": "a patch embedding with 33 channels shows that the model takes a portrait",
        "init_lora_weights": "a training setting",
        "use_checkpoint": "a training setting (gradient checkpointing)",
        "train_log": "a training setting",
        "debug": "has no effect on inference",
        "infer": "has no effect on inference",
    }
)
"""Keys of the original code that are accepted without effect, each with the reason."""

NEGATIVE_PROMPT = (
    "Vivid color tones, background/camera moving quickly, screen switching, subtitles and special effects, "
    "mutation, overexposed, static, blurred details, subtitles, style, work, painting, image, still, "
    "overall grayish, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra "
    "fingers, poorly drawn hands, poorly drawn face, deformed, disfigured, malformed limbs, fingers "
    "merging, motionless image, chaotic background, three legs, crowded background with many people, "
    "walking backward"
)
"""The negative prompt of the original code."""


class FieldError(ValueError):
    """An invalid combination of values.

    fields: the leaves involved, the most likely culprit first; with their sections if these differ.
    """

    def __init__(self, message: str, *fields: str) -> None:
        super().__init__(message)
        self.fields = fields


CAUSAL_FIELDS = ("causal_block", "causal_window", "causal_sink", "noise_span", "noise_white")
"""Fields of the sampling section that only `sampler: causal` reads."""
WINDOW_FIELDS = ("overlap_frame", "max_tokens")
"""Fields of the video section that only the other samplers read."""
MOST_EXACT = 2**53
"""Up to here every whole number is exact as a float."""
MOST_PROMPT_BYTES = 65_536
"""Of a prompt in UTF-8. The model uses 512 tokens, which is far less."""
MOST_PATH_BYTES, MOST_NAME_BYTES = 4095, 255
"""Of a path, and of each name in it."""
MOST_SEARCHED = 10_000
"""Names that a path pattern may look at."""


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        if abs(value) > MOST_EXACT:
            raise ValueError("must be a whole number in digits; with a point or an exponent it is not exact")
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("must be a whole number")
    return value


def real(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    return value


def _flag(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def words(value: Any) -> Any:
    return (
        tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
    )


POCKET = "pocket:"
"""Prefix of a path in the folder of the packaged model's weights."""
POCKET_WEIGHTS = Path(__file__).parent.parent / "assets" / "pocket" / "weights"


def prompt_text(value: Any) -> str:
    """`value`, if the text encoder can take it as a prompt. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError("must be text")
    if problem := surrogate_problem(value):
        raise ValueError(f"{problem}; write it as UTF-8 text")
    size = len(value.encode())
    if size > MOST_PROMPT_BYTES:
        raise ValueError(
            f"has {size:,} bytes, the most is {MOST_PROMPT_BYTES:,}; the model uses the first 512 tokens, "
            "shorten it"
        )
    return value


def path_text(value: str | Path) -> Path:
    """`value` as a path that the system can hold, with `~` as the home folder. Raises ValueError."""
    text = str(value)
    if not text.strip():
        raise ValueError("must be a path")
    if "\0" in text:
        raise ValueError("holds a NUL character, which no path can; remove it")
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError(f"{surrogate_problem(text)}, which no path can; remove it") from None
    names = encoded.replace(os.fsencode(os.sep), b"/").split(b"/")
    if len(encoded) > MOST_PATH_BYTES or max(map(len, names)) > MOST_NAME_BYTES:
        raise ValueError(
            f"is too long for a path; the most is {MOST_NAME_BYTES} bytes a name, {MOST_PATH_BYTES} in total"
        )
    try:
        return Path(value).expanduser()
    except RuntimeError:
        name = Path(text).parts[0]
        raise ValueError(f"the home folder of {name} is not known; write the whole path") from None


def expanded(value: str | Path, option: str) -> Path:
    """`path_text` of the value of an option. Raises ConfigError."""
    try:
        return path_text(value)
    except ValueError as error:
        raise ConfigError(f"{option} {quoted(str(value))}: {error}") from None


def _path(value: Any) -> Any:
    if not isinstance(value, str | Path):
        raise ValueError("must be a path")
    path = path_text(value)
    if str(value).startswith(POCKET):
        return POCKET_WEIGHTS / str(value).removeprefix(POCKET)
    return path


def _paths(value: Any) -> Any:
    """Paths from one path, a comma-separated text or a list; a pattern becomes its sorted matches."""
    parts = words(str(value)) if isinstance(value, str | Path) else value
    if not isinstance(parts, list | tuple):
        raise ValueError("must be a path, a list of paths, or a pattern such as folder/*.safetensors")
    files: list[Path] = []
    for part in parts:
        path = _path(part)
        files.extend(_matches(path) or [path])
    return tuple(files)


_PATTERN = frozenset("*?[")


def _matches(path: Path) -> list[Path]:
    """The sorted paths that match a pattern; empty for a path without `*`, `?` and `[`."""
    parts = path.parts[1:] if path.anchor else path.parts
    if not any(_PATTERN & set(part) for part in parts):
        return []
    if "**" in parts:
        raise ValueError("** would search the whole tree below a folder; name the folder, as in folder/*.st")
    found = [Path(path.anchor or ".")]
    searched = 0
    for number, part in enumerate(parts, start=1):
        if not _PATTERN & set(part):
            found = [folder / part for folder in found if os.path.exists(folder / part)]
            continue
        matches: list[Path] = []
        for folder in found:
            for name in _names(folder):
                searched += 1
                if searched > MOST_SEARCHED:
                    raise ValueError(f"looks at more than {MOST_SEARCHED:,} names; name the folder")
                last = number == len(parts)
                if fnmatch.fnmatchcase(name, part) and (last or os.path.isdir(folder / name)):
                    matches.append(folder / name)
        found = matches
    return sorted(found)


def _names(folder: Path) -> Iterator[str]:
    """Names of the entries of a folder; none if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                yield entry.name
    except OSError:
        return


def choice_or_path(value: Any) -> Any:
    return value if value in ("auto", "none") else _path(value)


def lora_entry(value: Any) -> Any:
    return {"path": value} if isinstance(value, str | Path) else value


def memory_limit(value: Any) -> Any:
    if value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError("must be auto or a number of GB above 0, such as 10")
    return float(value)


_DTYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
}


def dtype_name(value: Any) -> Any:
    name = str(value).removeprefix("torch.")
    return _DTYPES.get(name, name)


def scale_name(value: Any) -> Any:
    return value.upper() if isinstance(value, str) and value.upper() in ("1.3B", "14B") else value


def coefficients(value: Any) -> Any:
    named = scale_name(value)
    if named in ("auto", "1.3B", "14B"):
        return named
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("must be auto, 1.3B, 14B or a list of numbers, highest power first")
    return tuple(real(number) for number in value)


def web_address(value: str) -> str:
    """`value`, if it is an http(s) URL or empty. Raises ValueError."""
    if value and not re.fullmatch(r"https?://[^\s/]+\S*", value):
        raise ValueError("must be a URL such as http://timestamp.example/tsa, or empty")
    return value


def device_setting(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return value


def _size(value: tuple[int, int]) -> tuple[int, int]:
    if any(side < 16 or side % 16 for side in value):
        raise ValueError("sizes are [height, width], both multiples of 16")
    return value


def descending_timesteps(value: tuple[float, ...]) -> tuple[float, ...]:
    if error := timesteps_error(value):
        raise ValueError(error)
    return value


def rising_fractions(value: tuple[float, float]) -> tuple[float, float]:
    low, high = value
    if not 0 <= low <= high <= 1:
        raise ValueError("must be [low, high] with 0 <= low <= high <= 1, such as [0.0, 0.6]")
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Real = Annotated[float, BeforeValidator(real), Field(allow_inf_nan=False)]
Flag = Annotated[bool, BeforeValidator(_flag)]
FilePath = Annotated[Path, BeforeValidator(_path)]
FilePaths = Annotated[tuple[Path, ...], BeforeValidator(_paths)]
Size = Annotated[tuple[Whole, Whole], AfterValidator(_size)]


class Section(BaseModel):
    """Frozen values; unknown names are errors; a field's docstring is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )


class ProvenanceSettings(Section):
    """How finished videos are signed; part of the section `output`."""

    provenance: Flag = False
    """Write a signed C2PA manifest into the finished video: a model made it, with this program, from these
    inputs. Needs provenance_certificate and provenance_key."""
    provenance_certificate: FilePath | None = None
    """PEM file of the certificate chain that signs, the signing certificate first."""
    provenance_key: FilePath | None = None
    """PEM file of its private key, not encrypted, readable for this user only."""
    provenance_algorithm: Literal["auto", "es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] = (
        "auto"
    )
    """Signature algorithm; auto: the one of the key (ps256 for RSA)."""
    provenance_timestamp: Annotated[str, AfterValidator(web_address)] = ""
    """URL of a time stamp authority (RFC 3161), the only use of the network; empty: no time stamp, and the
    manifest holds until the certificate expires."""
    provenance_inputs: Literal["hashes", "contents"] = "hashes"
    """What the manifest holds of portrait and voice: their hashes, or also the files themselves."""
