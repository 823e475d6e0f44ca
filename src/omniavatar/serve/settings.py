"""Settings of `omniavatar serve`: defaults, a YAML file, the environment, options; the later ones win.

The environment variable of a setting is `OMNIAVATAR_SERVE_` and its name in capitals. With `_FILE` at its
end, it names a file that holds the value, as secrets of containers do. Every value knows its origin. Unknown
names are errors.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from omniavatar.config.change import changed
from omniavatar.config.load import MOST_BYTES, load_config
from omniavatar.config.schema import PipelineConfig
from omniavatar.config.syntax import parse_value, read_yaml
from omniavatar.config.values import web_address
from omniavatar.errors import ConfigError
from omniavatar.text import cut, quoted, read_text

PREFIX = "OMNIAVATAR_SERVE_"
FILE_VARIABLE = f"{PREFIX}CONFIG"
SECRETS = frozenset(("webhook_secret",))
"""Settings whose values are never printed."""
IN_FILE = "_file"
_PASSWORD = re.compile(r"(://[^/@:]*:)[^@]*(@)")
"""The password of a URL, which is never printed."""
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Count = Annotated[int, Field(ge=1)]


def _names(value: Mapping[str, str]) -> Mapping[str, str]:
    for name in value:
        if not MODEL_NAME.fullmatch(name):
            raise ValueError(f"{quoted(name)} can be no model name; use letters, digits, dots and dashes")
    if not value:
        raise ValueError("names no model; write {pocket: pocket}")
    return value


class ServeSettings(BaseModel):
    """Everything that a server can be configured with."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address to listen on. Another one than the loopback needs API keys, or insecure."""
    port: int = Field(8000, ge=0, le=65535)
    """TCP port; 0 picks a free one."""
    insecure: bool = False
    """Listen on any address without API keys."""
    allowed_hosts: tuple[str, ...] = ()
    """More names that the Host header may have; with *, any. The loopback allows only its own names."""
    cors_origins: tuple[str, ...] = ()
    """Origins (https://page.example) whose browser pages may use the API; none by default."""
    models: Annotated[Mapping[str, str], AfterValidator(_names)] = {"pocket": "pocket"}
    """Models by the name that clients use: a configuration file each, pocket or pocket-live. The first is
    the default."""
    data_dir: Path = Path("omniavatar_serve")
    """Folder of the job database, the files and the audit log, unless they are set."""
    database: str = ""
    """URL of the job database (sqlite:///... or postgresql://...); empty: jobs.db in data_dir."""
    files: str = ""
    """Folder or fsspec URL of inputs and videos; empty: files in data_dir."""
    gpus: str = "cpu"
    """cpu, all, or GPU numbers such as 0,1."""
    workers: Count = 1
    """Worker processes on the CPU."""
    gpus_per_job: Count = 1
    """GPUs that make one video together."""
    ray_address: str = ""
    """Ray cluster whose GPUs make the videos; empty: this machine."""
    upload_bytes: Count = 100_000_000
    """Largest request body, counted while it arrives."""
    uploads_bytes: Count = 4_000_000_000
    """Largest sum of the bodies that arrive at the same time."""
    upload_seconds: float = Field(600.0, gt=0)
    """Longest time for a body to arrive."""
    portrait_pixels: Count = 50_000_000
    """Largest portrait, width times height."""
    voice_seconds: float = Field(600.0, gt=0)
    """Longest voice."""
    most_steps: Count = 100
    """Most denoising steps that a request may ask for."""
    queue_length: Count = 1000
    """Most jobs that wait or run."""
    requests_per_minute: Count = 600
    """Requests of one key, or of one address without keys; a key can have another limit."""
    check_processes: Count = 2
    """Processes that decode uploads to check them."""
    check_seconds: float = Field(60.0, gt=0)
    """Longest time for checking one upload."""
    event_streams: Count = 200
    """Most event streams and followed videos at the same time."""
    poll_after_ms: int = Field(1000, ge=10, le=60_000)
    """Least milliseconds that the header openai-poll-after-ms tells waiting clients."""
    polls_per_second: Count = 50
    """Polls of all clients together that the header aims at: the longer the queue, the longer their pause."""
    sync_seconds: float = Field(1800.0, gt=0)
    """Longest wait of POST /v1/videos/sync; the job goes on after it."""
    keep_seconds: float = Field(7 * 86400.0, gt=0)
    """How long finished videos and failed jobs are kept at least."""
    keep_bytes: Count | None = None
    """Expired videos stay while all videos are below this size; unset: they are deleted at once."""
    url_inputs: bool = False
    """Whether input_reference and audio_reference may be http(s) URLs."""
    private_urls: bool = False
    """Whether URLs of inputs and webhooks may lead to private addresses."""
    webhook_secret: str = ""
    """Secret (32 or more characters) that signs webhooks; without it, requests cannot have one."""
    webhook_tries: Count = 10
    """Tries to deliver a webhook; the pause doubles from 5 seconds to an hour."""
    audit_log: Path | None = None
    """File of the audit log; unset: audit.jsonl in data_dir."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level of the log, which is JSON on stderr."""
    metrics_port: int = Field(0, ge=0, le=65535)
    """Port on which `serve worker` answers /health, /ready and /metrics, at host; 0: none."""
    provenance: bool = False
    """Sign every video with a C2PA manifest; otherwise those whose request asks, if a certificate is set."""
    provenance_certificate: Path | None = None
    """PEM file of the certificate chain that signs; unset: that of the model's configuration, if any."""
    provenance_key: Path | None = None
    """PEM file of its private key. Only the workers read it."""
    provenance_timestamp: str = ""
    """URL of a time stamp authority (RFC 3161); empty: no time stamps."""
    otlp_endpoint: str = ""
    """OpenTelemetry collector for traces, such as http://localhost:4318/v1/traces; empty: no traces."""
    drain_seconds: float = Field(600.0, ge=0)
    """How long SIGTERM waits for running windows."""

    @field_validator("webhook_secret")
    @classmethod
    def _long_secret(cls, value: str) -> str:
        if value and len(value) < 32:
            raise ValueError("must have 32 or more characters; make one with `openssl rand -hex 32`")
        return value

    @field_validator("provenance_timestamp", "otlp_endpoint")
    @classmethod
    def _address(cls, value: str) -> str:
        return web_address(value)

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not re.fullmatch(r"https?://[^/\s*]+", origin):
                raise ValueError(f"{quoted(origin)} is no origin; write https://page.example")
        return value

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.data_dir / 'jobs.db'}"

    @property
    def files_place(self) -> str:
        return self.files or str(self.data_dir / "files")

    @property
    def audit_path(self) -> Path:
        return self.audit_log or self.data_dir / "audit.jsonl"

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True)
class LoadedSettings:
    """Settings, and the origin of each: default, file and line, environment variable, or option."""

    settings: ServeSettings
    origins: Mapping[str, str]

    def rows(self) -> Iterator[tuple[str, Any, str]]:
        """Name, printable value and origin of each setting; secrets are hidden."""
        for name, value in self.settings.model_dump(mode="json").items():
            if isinstance(value, str):
                value = _PASSWORD.sub(r"\1(hidden)\2", value)
            yield name, "(hidden)" if name in SECRETS and value else value, self.origins[name]


def load_configs(settings: ServeSettings) -> dict[str, PipelineConfig]:
    """The configurations of the models by name, with the server's provenance. Raises ConfigError."""
    own = {
        name: value
        for name in ("provenance", "provenance_certificate", "provenance_key", "provenance_timestamp")
        if (value := getattr(settings, name))
    }
    return {name: changed(load_config(path).config, output=own) for name, path in settings.models.items()}


def load_settings(
    path: Path | None = None,
    options: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> LoadedSettings:
    """The settings of a server.

    path: YAML file; None for the one that the environment variable `OMNIAVATAR_SERVE_CONFIG` names, if any.
    options: of the command line; None as a value means not given.

    Raises ConfigError.
    """
    given: dict[str, tuple[Any, str]] = {}
    if path is None and environment.get(FILE_VARIABLE):
        path = Path(environment[FILE_VARIABLE])
    if path is not None:
        text = read_text(path, MOST_BYTES, ConfigError, "settings file not found; check the path")
        for entry in read_yaml(text, str(path), frozenset()):
            given[_known(entry.key, entry.origin)] = (entry.value, entry.origin)
    for variable, text in sorted(environment.items()):
        if variable.startswith(PREFIX) and variable != FILE_VARIABLE:
            name, origin = variable.removeprefix(PREFIX).lower(), variable
            if name.endswith(IN_FILE) and name.removesuffix(IN_FILE) in ServeSettings.model_fields:
                name, origin = name.removesuffix(IN_FILE), f"{variable} ({text})"
                if f"{PREFIX}{name.upper()}" in environment:
                    raise ConfigError(f"{variable}: {PREFIX}{name.upper()} is set too; leave one of them out")
                try:
                    text = read_text(text, MOST_BYTES, ConfigError).strip()
                except ConfigError as error:
                    raise ConfigError(f"{variable}: {error}") from None
            name = _known(name, variable)
            given[name] = (_from_text(name, text, variable), origin)
    for name, value in (options or {}).items():
        if value is not None:
            given[name] = (value, f"--{name.replace('_', '-')}")
    try:
        settings = ServeSettings.model_validate({name: value for name, (value, _) in given.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        shown = "" if name in SECRETS else f"; got {quoted(first['input'])}"
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        raise ConfigError(f"{given[name][1]}: {name}: {message}{shown}") from None
    origins = {name: given[name][1] if name in given else "default" for name in ServeSettings.model_fields}
    return LoadedSettings(settings, origins)


def _known(name: str, origin: str) -> str:
    if name in ServeSettings.model_fields:
        return name
    close = difflib.get_close_matches(name, ServeSettings.model_fields, n=1)
    remedy = f"did you mean {close[0]}?" if close else "`omniavatar serve config` lists all"
    raise ConfigError(f"{origin}: unknown setting {cut(name)}; {remedy}")


def _from_text(name: str, text: str, variable: str) -> Any:
    """The value of an environment variable. A list may be written `a,b`."""
    if name in ("models", "allowed_hosts", "cors_origins"):
        if text.strip()[:1] in ("[", "{"):
            return parse_value(text, variable)
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if name != "models":
            return parts
        pairs = [part.partition("=") for part in parts]
        return {model: path or model for model, _, path in pairs}
    return text
