"""The input file: one request a line, as text, JSON lines or CSV. The file name's ending selects the format.

- text: `prompt@@image@@audio`, or `prompt@@image` for a silent video. Blank lines and lines that begin with
  `#` are skipped.
- `.jsonl`: one object a line. `.csv`: a header line, then one row a request. The keys are `prompt`, `image`,
  `audio`, `output` (a file name in the output folder) and those of `SamplingParams`, such as `seed`.

Files are UTF-8, with or without a byte-order mark. A path is relative to the current directory; if no file
exists at that path, it is relative to the input file's folder. A line that cannot be used becomes a
`BadLine`; the others still run. In a CSV, empty cells without a column name are ignored.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from omniavatar.config.change import effective_sampling
from omniavatar.config.schema import PipelineConfig, SamplingConfig
from omniavatar.config.values import MOST_NAME_BYTES, path_text, prompt_text
from omniavatar.engine.csv_rows import csv_rows
from omniavatar.engine.targets import output_path
from omniavatar.errors import ConfigError, InputError
from omniavatar.text import JsonError, check_encoding, cut, parse_json, quoted, read_bytes, surrogate_problem
from omniavatar.types import AvatarRequest, SamplingParams

SEPARATOR = "@@"
MOST_BYTES = 64_000_000
"""Of an input file."""
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


def read_requests(
    path: str | Path, configured: SamplingConfig | None = None, text: bool = True
) -> list[RequestLine | BadLine]:
    """Requests of the input file, in file order.

    - configured: the configuration that a line's sampling values change (default: the default values).
    - text: the model takes a prompt; without, a line's may be empty.

    Raises InputError if the file is missing, is not a regular file, is too large, is UTF-16 or contains no
    request.
    """
    path = Path(path)
    configured = configured or SamplingConfig()
    read = {".jsonl": _json_lines, ".csv": _csv_rows}.get(path.suffix.lower(), _text_lines)
    requests: list[RequestLine | BadLine] = []
    line_of: dict[str, int] = {}
    for number, values in read(_text(path), path):
        index = len(requests)
        try:
            if isinstance(values, str):
                raise InputError(f"{path}:{number}: {values}")
            request = _request(values, path, number, index, configured, text)
            if request.output is not None and line_of.setdefault(request.output, number) != number:
                raise InputError(
                    f"{path}:{number}: output {cut(request.output)} is already used by line "
                    f"{line_of[request.output]}; give each line another name"
                )
            requests.append(request)
        except InputError as error:
            requests.append(BadLine(index, number, error))
    if not requests:
        raise InputError(f"{path}: has no request; write lines of prompt{SEPARATOR}image{SEPARATOR}audio")
    return requests


def _text(path: Path) -> str:
    """The file's text; bytes that are not UTF-8 become lone surrogates, which are errors of their lines."""
    data = read_bytes(path, MOST_BYTES, InputError, "no such input file")
    check_encoding(path, data, InputError)
    return data.decode("utf-8-sig", "surrogateescape")


_Rows = Iterator[tuple[int, Mapping[str, Any] | str]]
"""Line number, and the values of a request or what is wrong with the line."""


def _text_lines(text: str, path: Path) -> _Rows:
    for number, line in enumerate(text.split("\n"), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        parts = [part.strip() for part in stripped.split(SEPARATOR)]
        if len(parts) > 3:
            yield number, f"{len(parts)} parts; a line is prompt{SEPARATOR}image{SEPARATOR}audio"
        else:
            yield number, dict(zip(("prompt", "image", "audio"), parts, strict=False))


def _json_lines(text: str, path: Path) -> _Rows:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = parse_json(line)
        except JsonError as error:
            yield number, f"not valid JSON ({error}); write one object a line"
            continue
        if isinstance(values, dict):
            yield number, values
        else:
            yield number, 'must be an object, such as {"prompt": "..."}'


def _csv_rows(text: str, path: Path) -> _Rows:
    rows = iter(csv_rows(text))
    number, header = next(rows, (1, []))
    if isinstance(header, str):
        raise InputError(f"{path}:{number}: {header}")
    header = [name.strip() for name in header]
    named = [name for name in header if name]
    if not {"prompt", "image"} <= set(named) or len(set(named)) < len(named):
        raise InputError(
            f"{path}:{number}: the header must name prompt and image, and no column twice; "
            "separate the names by commas"
        )
    for number, row in rows:
        if isinstance(row, str):
            yield number, row
            continue
        cells = [cell.strip() for cell in row]
        while len(cells) > len(header) and not cells[-1]:
            cells.pop()
        unnamed = [column for column, name in enumerate(header[: len(cells)]) if not name and cells[column]]
        if len(cells) > len(header):
            yield number, f"{len(cells)} cells for {len(header)} columns; quote cells that hold commas"
        elif unnamed:
            yield number, f"cell {unnamed[0] + 1} is in a column without a name; name it in the header"
        elif any(cells):
            filled = zip(header, cells, strict=False)
            yield number, {name: _cell(name, cell) for name, cell in filled if cell}


def _cell(name: str, cell: str) -> Any:
    """The value of a CSV cell; numbers and lists are written as in JSON."""
    if name in _TEXT_KEYS:
        return cell
    try:
        return parse_json(cell)
    except JsonError:
        return cell


def _request(
    values: Mapping[str, Any],
    path: Path,
    number: int,
    index: int,
    configured: SamplingConfig,
    takes_text: bool,
) -> RequestLine:
    where = f"{path}:{number}"
    for key in values:
        if key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(KEYS)}"
            raise InputError(f"{where}: unknown key {quoted(key)}; {hint}")
    texts = {key: values.get(key) for key in ("prompt", "image", "audio", "output")}
    for key, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise InputError(f"{where}: {key} must be text; got {quoted(text)}")
        if problem := None if text is None else _text_problem(text):
            raise InputError(f"{where}: {key} {problem}")
    prompt, image, audio, output = (text.strip() if text else None for text in texts.values())
    prompt = prompt or ""
    if not prompt and takes_text:
        raise InputError(f"{where}: no prompt; describe the video in a sentence")
    if not image:
        raise InputError(
            f"{where}: no image; the model needs a portrait, write prompt{SEPARATOR}image{SEPARATOR}audio"
        )
    try:
        prompt_text(prompt)
    except ValueError as error:
        raise InputError(f"{where}: prompt {error}") from None
    if output is not None:
        _check_output(output, where)
    return RequestLine(
        index,
        number,
        prompt,
        _find(image, "image", path.parent, where),
        None if audio is None else _find(audio, "audio", path.parent, where),
        output,
        _sampling(values, where, configured),
    )


def _text_problem(text: str) -> str | None:
    if problem := surrogate_problem(text):
        return f"{problem}; write it as UTF-8 text"
    return "holds a NUL character; remove it" if "\0" in text else None


def _check_output(output: str, where: str) -> None:
    """Raise InputError if `output` cannot be the name of a video."""
    shown = cut(output)
    if Path(output).name != output or not output.lower().endswith(".mp4"):
        raise InputError(f"{where}: output {shown}: must be a file name without folders that ends in .mp4")
    if Path(output).suffix.lower() != ".mp4":
        raise InputError(f"{where}: output {shown}: has no name before .mp4; write a name such as video.mp4")
    if len(os.fsencode(output)) > MOST_NAME_BYTES:
        raise InputError(
            f"{where}: output {shown}: is longer than {MOST_NAME_BYTES} bytes; choose a shorter name"
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
    choices = [Path(name), folder / name]
    note = ""
    try:
        choices.insert(0, path_text(name))
    except ValueError as error:
        note = f" ({error})"
    choices = list(dict.fromkeys(choices))
    for choice in choices:
        if os.path.isfile(choice):
            return choice
    for choice in choices:
        if os.path.exists(choice):
            what = "a folder" if os.path.isdir(choice) else "a device or a FIFO"
            raise InputError(f"{where}: {kind} {cut(str(choice))} is {what}; give a file")
    found = " or ".join(cut(str(choice)) for choice in choices)
    raise InputError(f"{where}: {kind} not found: {found}{note}; check the path")
