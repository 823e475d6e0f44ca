"""The input file: one request a line, as text, JSON lines or CSV. The file name's ending selects the format.

- text: `prompt@@image@@audio`, or `prompt@@image` for a silent video. Blank lines and lines that begin with
  `#` are skipped.
- `.jsonl`: one object a line. `.csv`: a header line, then one row a request. The keys are `prompt`, `image`,
  `audio`, `output` (a file name in the output folder) and those of `SamplingParams`, such as `seed`.

Files are UTF-8, with or without a byte-order mark. A path is relative to the current directory; if no file
exists at that path, it is relative to the input file's folder. A line that cannot be used becomes a
`BadLine`; the others still run.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from omniavatar.config.change import effective_sampling
from omniavatar.config.schema import PipelineConfig, SamplingConfig
from omniavatar.engine.targets import output_path
from omniavatar.errors import ConfigError, InputError
from omniavatar.types import AvatarRequest, SamplingParams

SEPARATOR = "@@"
SAMPLING_KEYS = tuple(key.name for key in fields(SamplingParams))
KEYS = ("prompt", "image", "audio", "output", *SAMPLING_KEYS)
_TEXT_KEYS = frozenset(("prompt", "image", "audio", "output", "sampler", "negative_prompt", "step_cache"))


@dataclass(frozen=True)
class RequestLine:
    """One line's request.

    - index: counts requests from 0. line: counts lines of the file from 1.
    - output: name of the video in the output folder; None means a name made from index and prompt.
    """

    index: int
    line: int
    prompt: str
    image: Path
    audio: Path | None
    output: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def request(self) -> AvatarRequest:
        return AvatarRequest(self.prompt, self.image, self.audio, self.sampling)

    def target(self, config: PipelineConfig) -> Path:
        """Path of the video."""
        default = output_path(config.output, config.sampling, self.index, self.prompt)
        return default if self.output is None else default.with_name(self.output)


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be used, and the reason."""

    index: int
    line: int
    error: InputError


def read_requests(path: str | Path, configured: SamplingConfig | None = None) -> list[RequestLine | BadLine]:
    """Requests of the input file, in file order.

    - configured: the configuration that a line's sampling values change (default: the default values).

    Raises InputError if the file is missing, is not UTF-8 text or contains no request.
    """
    path = Path(path)
    configured = configured or SamplingConfig()
    read = {".jsonl": _json_lines, ".csv": _csv_rows}.get(path.suffix.lower(), _text_lines)
    requests: list[RequestLine | BadLine] = []
    line_of: dict[str, int] = {}
    for number, values in read(_text(path), path):
        index = len(requests)
        try:
            if isinstance(values, InputError):
                raise values
            request = _request(values, path, number, index, configured)
            if request.output is not None and line_of.setdefault(request.output, number) != number:
                raise InputError(
                    f"{path}:{number}: output {request.output} is already used by line "
                    f"{line_of[request.output]}; give each line another name"
                )
            requests.append(request)
        except InputError as error:
            requests.append(BadLine(index, number, error))
    if not requests:
        raise InputError(f"{path}: has no request; write lines of prompt{SEPARATOR}image{SEPARATOR}audio")
    return requests


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such input file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


_Rows = Iterator[tuple[int, Mapping[str, Any] | InputError]]


def _text_lines(text: str, path: Path) -> _Rows:
    for number, line in enumerate(text.split("\n"), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        parts = [part.strip() for part in stripped.split(SEPARATOR)]
        if len(parts) > 3:
            yield (
                number,
                InputError(
                    f"{path}:{number}: {len(parts)} parts; a line is prompt{SEPARATOR}image{SEPARATOR}audio"
                ),
            )
        else:
            yield number, dict(zip(("prompt", "image", "audio"), parts, strict=False))


def _json_lines(text: str, path: Path) -> _Rows:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, InputError(f"{path}:{number}: not valid JSON ({error}); write one object a line")
            continue
        if isinstance(values, dict):
            yield number, values
        else:
            yield number, InputError(f'{path}:{number}: must be an object, such as {{"prompt": "..."}}')


def _csv_rows(text: str, path: Path) -> _Rows:
    rows = csv.reader(io.StringIO(text, newline=""))
    try:
        header = [name.strip() for name in next(rows, [])]
        if not {"prompt", "image"} <= set(header) or len(set(header)) < len(header):
            raise InputError(f"{path}:1: the header must name prompt and image, and no column twice")
        for row in rows:
            if len(row) > len(header):
                yield (
                    rows.line_num,
                    InputError(
                        f"{path}:{rows.line_num}: {len(row)} cells for {len(header)} columns; "
                        "quote cells that hold commas"
                    ),
                )
            elif any(cell.strip() for cell in row):
                cells = zip(header, (cell.strip() for cell in row), strict=False)
                yield rows.line_num, {name: _cell(name, cell) for name, cell in cells if cell}
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num}: not valid CSV ({error}); check the quotes") from None


def _cell(name: str, cell: str) -> Any:
    """The value of a CSV cell; numbers and lists are written as in JSON."""
    if name in _TEXT_KEYS:
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


def _request(
    values: Mapping[str, Any], path: Path, number: int, index: int, configured: SamplingConfig
) -> RequestLine:
    where = f"{path}:{number}"
    for key in values:
        if key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(KEYS)}"
            raise InputError(f"{where}: unknown key {key!r}; {hint}")
    texts = {key: values.get(key) for key in ("prompt", "image", "audio", "output")}
    for key, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise InputError(f"{where}: {key} must be text; got {text!r}")
    prompt, image, audio, output = (text.strip() if text else None for text in texts.values())
    if not prompt:
        raise InputError(f"{where}: no prompt; describe the video in a sentence")
    if not image:
        raise InputError(
            f"{where}: no image; the model needs a portrait, write prompt{SEPARATOR}image{SEPARATOR}audio"
        )
    if output is not None and (Path(output).name != output or not output.lower().endswith(".mp4")):
        raise InputError(f"{where}: output {output}: must be a file name without folders that ends in .mp4")
    return RequestLine(
        index,
        number,
        prompt,
        _find(image, "image", path.parent, where),
        None if audio is None else _find(audio, "audio", path.parent, where),
        output,
        _sampling(values, where, configured),
    )


def _sampling(values: Mapping[str, Any], where: str, configured: SamplingConfig) -> SamplingParams:
    changes = {key: values[key] for key in SAMPLING_KEYS if values.get(key) is not None}
    if not changes:
        return SamplingParams()
    try:
        checked = effective_sampling(configured, SamplingParams(**changes))
    except ConfigError as error:
        raise InputError(f"{where}: {str(error).removeprefix('request: ')}") from None
    return replace(SamplingParams(), **{key: getattr(checked, key) for key in changes})


def _find(name: str, kind: str, folder: Path, where: str) -> Path:
    choices = list(dict.fromkeys((Path(name).expanduser(), folder / name)))
    for choice in choices:
        try:
            if choice.is_file():
                return choice
        except (OSError, ValueError):
            break
    raise InputError(f"{where}: {kind} not found: {' or '.join(str(choice) for choice in choices)}")
