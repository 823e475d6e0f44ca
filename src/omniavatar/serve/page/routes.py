"""The routes of the page: its files, what it shows of the server, and what it needs beside `/v1/videos`.

The page is plain HTML, CSS and JavaScript modules. Its policy forbids every script, style and connection that
is not this server's own.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import FileResponse, RedirectResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp

from omniavatar import __version__
from omniavatar.assets import SPEECH, pocket
from omniavatar.errors import ResourceError
from omniavatar.media.temporary import temporary_folder
from omniavatar.serve.api.access import READ, WRITE
from omniavatar.serve.api.body import Body, ExtensionFields, VideoFields, parsed
from omniavatar.serve.api.checks import PORTRAIT, VOICE
from omniavatar.serve.api.errors import SERVER, ApiError, field_error
from omniavatar.serve.api.replies import VideoWarning
from omniavatar.serve.api.service import IMAGE_NAME, SOUND_NAME, Service
from omniavatar.serve.api.turns import in_turn
from omniavatar.serve.api.videos import ERRORS, JobId
from omniavatar.serve.jobs.slots import PARAMS
from omniavatar.serve.page.info import Offer, PageInfo, page_model
from omniavatar.serve.page.inputs import InputWarnings
from omniavatar.serve.page.session import COOKIE, PARAMETER, KeyCookie
from omniavatar.serve.page.times import Times
from omniavatar.serve.page.voices import INSTALL, MOST_CHARACTERS, SPEEDS, Voice
from omniavatar.serve.page.words import intents
from omniavatar.types import AvatarRequest

TALK = "/talk"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; media-src 'self' blob:; connect-src 'self'; frame-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "camera=(self), microphone=(self), geolocation=(), payment=(), usb=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


class Talk(Protocol):
    """Live sessions in this process."""

    @property
    def app(self) -> ASGIApp:
        """Mounted at `/talk`."""
        ...

    def use(self, portrait: Path) -> None:
        """Show a copy of this portrait from the next session on."""
        ...


class WorkerState(BaseModel):
    """Whether a worker is ready, else why none could start; empty while it starts."""

    ready: bool
    problem: str = ""


@dataclass(frozen=True)
class PageParts:
    """What the page has. example: whether it begins with the packaged portrait and voice.

    check: warns of inputs before a run; None: only the worker warns.
    key: that the page needs on a server with keys. no_talk: why there is no `talk`, and what to do.
    """

    times: Times
    example: bool = False
    check: InputWarnings | None = None
    voice: Voice | None = None
    talk: Talk | None = None
    no_talk: str = ""
    key: str | None = None
    price_per_hour: float = 0.0
    worker: Callable[[], WorkerState] = lambda: WorkerState(ready=True)
    files: Mapping[str, bytes] = field(default_factory=lambda: page_files())


class TimesAsked(BaseModel):
    """A video of which the page wants the times. seconds: of the voice; None for a silent one."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    size: str | None = None
    seconds: Annotated[float, Field(gt=0, le=86400)] | None = None


class IntentTime(BaseModel):
    """compute_seconds: None while unknown."""

    windows: int
    steps: int
    compute_seconds: float | None


class IntentTimes(BaseModel):
    """measuring: whether this machine is being measured now, so that it pays to ask again."""

    times: dict[str, IntentTime]
    measuring: bool


class WarningsReply(BaseModel):
    """What a run of the request would warn of."""

    warnings: list[VideoWarning]


class UsedSettings(BaseModel):
    """What a job was made from, to use it again. files: which inputs are kept."""

    prompt: str
    model: str
    size: str | None
    settings: dict[str, Any]
    extends: str | None
    files: list[Literal["portrait", "voice"]]


class SpeechAsked(BaseModel):
    """The fields of OpenAI's /v1/audio/speech that have an effect here."""

    model_config = ConfigDict(extra="forbid")

    input: Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS)]
    model: str | None = None
    voice: str | None = None
    response_format: Literal["wav"] = "wav"
    speed: Annotated[float, Field(ge=SPEEDS[0], le=SPEEDS[1])] = 1.0


def page_files() -> dict[str, bytes]:
    """The page's files by name."""
    folder = resources.files("omniavatar.serve.page").joinpath("static")
    return {item.name: item.read_bytes() for item in folder.iterdir() if Path(item.name).suffix in TYPES}


def add_page(app: FastAPI, parts: PageParts) -> None:
    """Add the page to an app of `create_app`, before it answers its first request."""
    service: Service = app.state.service
    service.times = parts.times
    app.include_router(_page(service, parts))
    if parts.talk is not None:
        app.mount(TALK, parts.talk.app)
    app.add_middleware(KeyCookie)


def _page(service: Service, parts: PageParts) -> APIRouter:
    router = APIRouter(responses=ERRORS, include_in_schema=False)

    @router.get("/")
    def index(request: Request) -> Response:
        """The page; with the page's key in the address, the cookie first."""
        given = request.query_params.get(PARAMETER)
        if given is None:
            return Response(parts.files["index.html"], media_type="text/html", headers=SECURITY)
        answer = RedirectResponse("/", 303, headers=SECURITY)
        if parts.key is not None and hmac.compare_digest(given.encode(), parts.key.encode()):
            answer.set_cookie(COOKIE, given, httponly=True, samesite="strict", path="/")
        return answer

    @router.get("/page/files/{name}")
    def page_file(name: str) -> Response:
        content = parts.files.get(name)
        if content is None:
            raise ApiError(404, "not_found", "the page has no such file; reload it")
        return Response(content, media_type=TYPES[Path(name).suffix], headers=SECURITY)

    @router.get("/page/info")
    def info(request: Request) -> PageInfo:
        service.access.caller(request, READ)
        voice = Offer(available=False, remedy=INSTALL)
        if parts.voice is not None:
            voice = Offer(available=True, name=parts.voice.name)
        return PageInfo(
            version=__version__,
            models=[page_model(name, config) for name, config in service.models.configs.items()],
            example=parts.example,
            voice=voice,
            talk=Offer(available=parts.talk is not None, name=TALK, remedy=parts.no_talk),
            price_per_hour=parts.price_per_hour,
            upload_bytes=service.settings.upload_bytes,
            voice_seconds=service.settings.voice_seconds,
        )

    @router.get("/page/worker")
    def worker(request: Request) -> WorkerState:
        """What a waiting video waits for."""
        service.access.caller(request, READ)
        return parts.worker()

    @router.get("/page/example/{kind}")
    def example(request: Request, kind: Literal["portrait", "voice"]) -> Response:
        """The packaged portrait or speech."""
        service.access.caller(request, READ)
        path, type = (pocket.PORTRAIT, "image/png") if kind == "portrait" else (SPEECH, "audio/flac")
        return FileResponse(path, media_type=type, filename=path.name)

    @router.post("/page/times")
    def times(request: Request, asked: TimesAsked) -> IntentTimes:
        """What each intent takes."""
        service.access.caller(request, READ)
        model = service.models.name(asked.model)
        size = service.models.size(model, asked.size)
        found: dict[str, IntentTime] = {}
        for name, settings in intents(service.models.configs[model]).items():
            plan = service.models.plan(model, size, None, asked.seconds, settings)
            seconds = service.compute_seconds(model, plan)
            found[name] = IntentTime(windows=plan.windows, steps=plan.steps, compute_seconds=seconds)
        return IntentTimes(times=found, measuring=parts.times.is_measuring(model))

    def warnings_of(body: Body) -> list[VideoWarning]:
        if parts.check is None:
            return []
        with temporary_folder("upload") as folder:
            asked = body.write(folder)
            spec, _ = service.checked(asked)
            portrait, voice = asked.files[PORTRAIT], asked.files.get(VOICE)
            request = AvatarRequest(spec.prompt, portrait, voice, size=spec.size)
            try:
                found = parts.check(service.models.configs[spec.model], request)
            except ResourceError as error:
                text = str(error).replace(f" {folder}/", " ")
                raise ApiError(503, "not_checked", text, type=SERVER) from None
        return [VideoWarning(message=each.text, param=PARAMS.get(each.about)) for each in found]

    @router.post("/page/warnings")
    async def warnings(request: Request) -> WarningsReply:
        """What the worker would warn of; it takes a few seconds."""
        await run_in_threadpool(service.access.caller, request, READ)
        async with parsed(request, VideoFields, service.settings, service.outside) as body:
            return WarningsReply(warnings=await in_turn(warnings_of, body))

    @router.get("/page/videos/{video_id}/settings")
    def used_settings(request: Request, video_id: JobId) -> UsedSettings:
        """What a video was made from."""
        spec = service.job(video_id, service.access.caller(request, READ)).spec
        kept: list[Literal["portrait", "voice"]] = []
        if service.files.size(video_id, spec.image) is not None and spec.extends is None:
            kept.append("portrait")
        if spec.audio is not None and service.files.size(video_id, spec.audio) is not None:
            kept.append("voice")
        size = None if spec.size is None else f"{spec.size[1]}x{spec.size[0]}"
        return UsedSettings(
            prompt=spec.prompt,
            model=spec.model,
            size=size,
            settings=dict(spec.settings),
            extends=spec.extends,
            files=kept,
        )

    @router.get("/page/videos/{video_id}/{kind}")
    def used_file(request: Request, video_id: JobId, kind: Literal["portrait", "voice"]) -> Response:
        """An input of a video, as bytes that no browser shows by itself."""
        service.job(video_id, service.access.caller(request, READ))
        path = service.files.local(video_id, IMAGE_NAME if kind == "portrait" else SOUND_NAME)
        return FileResponse(path, media_type="application/octet-stream", filename=kind)

    @router.post("/v1/audio/speech")
    def speech(request: Request, asked: SpeechAsked) -> Response:
        """A text as sound (WAV), in the dialect of OpenAI."""
        service.access.caller(request, WRITE)
        voice = parts.voice
        if voice is None:
            raise ApiError(
                501, "no_voice", f"this server has no voice for texts; {INSTALL} and start it again"
            )
        if asked.voice not in (None, voice.name):
            raise field_error("voice", f"is not available; the voice here is {voice.name}")
        with temporary_folder("speech") as folder:
            path = folder / "speech.wav"
            voice.speak(asked.input, path, asked.speed)
            return Response(path.read_bytes(), media_type="audio/wav")

    def use_portrait(talk: Talk, body: Body) -> None:
        with temporary_folder("upload") as folder:
            files = body.write(folder).files
            if PORTRAIT not in files:
                raise field_error(PORTRAIT, "is missing; choose a portrait", "missing_field")
            service.checker.check(files[PORTRAIT], None)
            talk.use(files[PORTRAIT])

    @router.post("/page/talk")
    async def talk_with(request: Request) -> dict[str, str]:
        """Use a portrait for the next live session."""
        await run_in_threadpool(service.access.caller, request, WRITE)
        if parts.talk is None:
            raise ApiError(501, "no_talk", parts.no_talk or "this server has no live sessions")
        async with parsed(request, ExtensionFields, service.settings, service.outside) as body:
            await run_in_threadpool(use_portrait, parts.talk, body)
        return {"address": f"{TALK}/"}

    return router
