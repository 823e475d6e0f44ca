"""Reads the body of a request, multipart or JSON, into fields and private files.

The guard counts the bytes while they arrive. A file of a JSON body is a `data:` URL or, if the server allows
it, an http(s) URL.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from omniavatar.config.values import prompt_text
from omniavatar.serve.api.addresses import AddressError, Outside, checked_url
from omniavatar.serve.api.checks import PORTRAIT, VOICE
from omniavatar.serve.api.errors import ApiError, field_error, validation_error
from omniavatar.serve.settings import ServeSettings
from omniavatar.text import JsonError, parse_json

FILES = (PORTRAIT, VOICE)
NAMES = {PORTRAIT: "portrait", VOICE: "voice"}
"""Names of the files of a request."""
_ALIASES = {PORTRAIT: ("image_url", "url"), VOICE: ("audio_url", "url")}
MOST_FIELD, MOST_PRIORITY = 1_000_000, 100


class Fields(BaseModel):
    """Fields of a request, but for its files."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(max_length=65536)] | None
    model: str | None = None
    size: str | None = None
    seconds: str | int | None = None
    seed: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    extra_params: dict[str, Any] = {}
    webhook_url: str | None = None
    provenance: bool = False
    priority: Annotated[int, Field(ge=-MOST_PRIORITY, le=MOST_PRIORITY)] = 0

    @field_validator("prompt")
    @classmethod
    def _usable(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value.strip():
            raise ValueError("is empty; describe the person and the scene in a sentence")
        return str(prompt_text(value))

    @field_validator("extra_params", mode="before")
    @classmethod
    def _object(cls, value: Any) -> Any:
        if value is None or value == "":
            return {}
        if not isinstance(value, str):
            return value
        try:
            return parse_json(value)
        except JsonError as error:
            raise ValueError(f"is not valid JSON ({error}); write an object such as {{}}") from None


class VideoFields(Fields):
    """Fields of a new video."""

    prompt: Annotated[str, Field(max_length=65536)]


class ExtensionFields(Fields):
    """Fields of an extension; without a prompt, that of the video goes on."""

    prompt: Annotated[str, Field(max_length=65536)] | None = None


@dataclass
class Asked:
    """A request with its files on the disk. files: by field name. digest: the same for the same request."""

    values: Fields
    files: dict[str, Path] = field(default_factory=dict)
    digest: str = ""


@dataclass(frozen=True)
class Body:
    """A parsed body whose files are not on the disk yet: open uploads, or URLs, by field name."""

    values: Fields
    given: Mapping[str, BinaryIO | str]
    settings: ServeSettings
    outside: Outside

    def write(self, folder: Path) -> Asked:
        """The request with its files in `folder`, by the names of `NAMES`; it blocks. Raises ApiError."""
        asked, hashes = Asked(self.values), {}
        for name, value in sorted(self.given.items()):
            path = asked.files[name] = folder / NAMES[name]
            if isinstance(value, str):
                _load(name, value, path, self.settings, self.outside)
            else:
                value.seek(0)
                with path.open("wb") as file:
                    shutil.copyfileobj(value, file, 2**20)
            with path.open("rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
        values = self.values.model_dump(mode="json")
        if not self.values.priority:  # so requests of versions without it keep their digest
            del values["priority"]
        text = json.dumps([values, hashes], sort_keys=True)
        asked.digest = hashlib.sha256(text.encode()).hexdigest()
        return asked


@asynccontextmanager
async def parsed(
    request: Request, kind: type[Fields], settings: ServeSettings, outside: Outside
) -> AsyncIterator[Body]:
    """The body of a request; its uploads are open while the block runs. Raises ApiError."""
    content = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    async with AsyncExitStack() as stack:
        if content == "application/json":
            raw, given = await _from_json(request)
        elif content in ("multipart/form-data", "application/x-www-form-urlencoded"):
            raw, given = await _from_form(request, stack)
        else:
            message = "the body must be multipart/form-data or application/json; set Content-Type"
            raise ApiError(415, "unsupported_media_type", message)
        try:
            values = kind.model_validate(raw)
        except ValidationError as error:
            raise validation_error(error.errors(include_url=False)) from None
        yield Body(values, given, settings, outside)


async def _from_json(request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        values = parse_json((await request.body()).decode("utf-8"))
    except (UnicodeDecodeError, JsonError) as error:
        problem = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ApiError(400, "invalid_json", f"the body is not valid JSON ({problem}); correct it") from None
    if not isinstance(values, dict):
        raise ApiError(400, "invalid_json", "the body must be a JSON object; write {...}")
    given: dict[str, Any] = {}
    for name in FILES:
        value = values.pop(name, None)
        if isinstance(value, dict):
            known = [value[alias] for alias in _ALIASES[name] if alias in value]
            value = known[0] if len(known) == 1 and len(value) == 1 else value
        if value is None:
            continue
        if not isinstance(value, str):
            raise field_error(name, "must be a data: URL or an http(s) URL, as text or {image_url: ...}")
        given[name] = value
    return values, given


async def _from_form(request: Request, stack: AsyncExitStack) -> tuple[dict[str, Any], dict[str, Any]]:
    raw: dict[str, Any] = {}
    given: dict[str, Any] = {}
    try:
        form = await stack.enter_async_context(
            request.form(max_files=2, max_fields=50, max_part_size=MOST_FIELD)
        )
    except HTTPException as error:
        raise ApiError(
            400, "invalid_body", f"the form cannot be read ({error.detail}); send it again"
        ) from None
    for name, value in form.multi_items():
        plain = name.partition("[")[0] if name.startswith(FILES) else name
        if plain in raw or plain in given:
            raise field_error(plain[:100], "is given more than once; give it once")
        if isinstance(value, UploadFile):
            if plain not in FILES:
                raise field_error(plain[:100], "is no file field; remove it", "unknown_field")
            given[plain] = value.file
        elif plain in FILES:
            if value:
                given[plain] = value
        else:
            raw[name] = value
    return raw, given


def _load(name: str, url: str, path: Path, settings: ServeSettings, outside: Outside) -> None:
    if url.startswith("data:"):
        head, comma, data = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise field_error(name, "must be a data URL such as data:image/png;base64,...")
        try:
            path.write_bytes(base64.b64decode(data, validate=True))
        except (binascii.Error, ValueError):
            raise field_error(name, "holds no valid base64; encode the file again") from None
        return
    if not settings.url_inputs:
        raise field_error(name, "URLs are off on this server; upload the file, or send a data: URL")
    try:
        outside.fetch(checked_url(url), path, settings.upload_bytes, settings.upload_seconds)
    except AddressError as error:
        raise field_error(name, f"the URL {error}", "invalid_url") from None
