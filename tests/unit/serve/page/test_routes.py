"""The page's routes, on the real store and without a browser."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import pytest

from omniavatar.assets import SPEECH, pocket
from omniavatar.config.identity import flat_values
from omniavatar.config.schema import PipelineConfig
from omniavatar.errors import InputError, ResourceError
from omniavatar.serve.batch.items import InputWarning
from omniavatar.serve.jobs.records import JobProgress, JobWarning
from omniavatar.serve.page.inputs import CheckedApart
from omniavatar.serve.page.routes import SECURITY, PageParts, WorkerState, add_page
from omniavatar.serve.page.session import COOKIE, KEY_FILE, page_key
from omniavatar.serve.page.times import Times
from omniavatar.serve.page.voices import PiperVoice
from omniavatar.types import AvatarRequest
from serve_api import FILES, MODELS, Serve, Server, portrait


class Beep:
    """A voice of one sample a letter."""

    name = "beep"

    def speak(self, text: str, path: Path, speed: float = 1.0) -> None:
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes(b"\x01\x02" * len(text))


class Check:
    """Finds the same in every voice; refuses the model's portrait."""

    def __call__(self, config: PipelineConfig, request: AvatarRequest) -> list[InputWarning]:
        if request.prompt == "broken":
            raise ResourceError(f"image {request.image} is too large")
        assert Path(str(request.image)).is_file() and request.size == (192, 192)
        return [] if request.audio is None else [InputWarning("audio", "audio: it is silent")]


class Stage:
    """Remembers the portrait of a conversation."""

    used = b""

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    def use(self, portrait: Path) -> None:
        self.used = portrait.read_bytes()


def dressed(server: Server, **parts: Any) -> Server:
    add_page(server.app, PageParts(Times(server.store, MODELS), **parts))
    return server


def test_the_page_and_its_policy(serve: Serve) -> None:
    client = dressed(serve()).client
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert policy == SECURITY["Content-Security-Policy"] and "unsafe" not in policy and "*" not in policy
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["x-frame-options"] == "DENY"
    for name, kind in {
        "main.js": "text/javascript",
        "style.css": "text/css",
        "icon.svg": "image/svg+xml",
    }.items():
        assert client.get(f"/page/files/{name}").headers["content-type"].startswith(kind)
    for name in ("none.js", "..%2Froutes.py", "__init__.py"):
        assert client.get(f"/page/files/{name}").status_code == 404


@pytest.mark.parametrize(
    "headers",
    [{"host": "evil.example"}, {"origin": "http://evil.example"}, {"origin": "null"}],
    ids=["host", "origin", "null"],
)
@pytest.mark.parametrize("path", ["/", "/page/info", "/page/files/main.js"])
def test_foreign_pages_and_names_are_refused(serve: Serve, path: str, headers: dict[str, str]) -> None:
    answer = dressed(serve()).client.get(path, headers=headers)
    assert answer.status_code in (403, 421) and set(answer.json()) == {"error"}


def test_what_the_page_shows_of_the_server(serve: Serve) -> None:
    info = dressed(serve(), price_per_hour=2.5, no_talk="run this").client.get("/page/info").json()
    (model,) = info["models"]
    assert model["packaged"] and model["sizes"] == [{"size": "192x192", "shape": "1:1"}]
    assert model["intents"] == {"preview": {"num_steps": 2}, "balanced": {}, "best": {"num_steps": 6}}
    kinds = {each["key"]: (each["kind"], each["value"]) for each in model["settings"]}
    assert kinds["num_steps"] == ("whole", 4) and kinds["shift"] == ("number", 5.0)
    assert kinds["timesteps"] == ("numbers", None) and kinds["negative_prompt"] == ("text", "")
    assert kinds["sampler"] == ("choice", "euler") and all(each["help"] for each in model["settings"])
    assert info["price_per_hour"] == 2.5 and info["talk"]["remedy"] == "run this"
    assert info["voice"] == {"available": False, "name": "", "remedy": "pip install 'omniavatar[voice]'"}


def test_every_setting_is_shown_once(serve: Serve) -> None:
    (model,) = dressed(serve()).client.get("/page/info").json()["models"]
    shown = [each["key"] for each in (*model["settings"], *model["fixed"])]
    assert sorted(shown) == sorted(name.partition(".")[2] for name in flat_values(MODELS.configs["pocket"]))
    fixed = {each["key"]: each for each in model["fixed"]}
    assert fixed["fps"]["value"] == "25" and fixed["crf"]["help"]


def test_warnings_before_a_run_name_the_field(serve: Serve) -> None:
    client = dressed(serve(), check=Check()).client
    asked = {"prompt": "x"}
    answer = client.post("/page/warnings", data=asked, files=FILES).json()
    assert answer == {"warnings": [{"message": "audio: it is silent", "param": "audio_reference"}]}
    portrait_only = {"input_reference": FILES["input_reference"]}
    assert client.post("/page/warnings", data=asked, files=portrait_only).json() == {"warnings": []}
    failed = client.post("/page/warnings", data={"prompt": "broken"}, files=FILES)
    error = failed.json()["error"]
    assert failed.status_code == 503 and error["message"] == "image portrait is too large"
    bad = client.post("/page/warnings", data={"prompt": "x"}, files={"input_reference": ("a.png", b"no")})
    assert bad.status_code == 400 and bad.json()["error"]["param"] == "input_reference"


def test_a_video_carries_the_warnings_of_its_worker(serve: Serve) -> None:
    server = serve()
    id, claim = server.create().json()["id"], server.claim()
    warning = JobWarning("audio: it is silent", "audio_reference")
    server.store.heartbeat(claim, JobProgress(0, 1, warnings=(warning,)))
    assert server.client.get(f"/v1/videos/{id}").json()["warnings"] == [vars(warning)]


@pytest.mark.slow
def test_a_check_that_takes_too_long_is_one_line_and_the_next_one_starts_again() -> None:
    check = CheckedApart(seconds=0.05)
    for _ in range(2):
        with pytest.raises(ResourceError, match=r"ended by SIGKILL .* the run itself warns too"):
            check(MODELS.configs["pocket"], AvatarRequest("x", pocket.PORTRAIT, SPEECH))
    check.close()


def test_why_a_video_waits(serve: Serve) -> None:
    state = WorkerState(ready=False, problem="no memory; close something")
    client = dressed(serve(), worker=lambda: state).client
    assert client.get("/page/worker").json() == state.model_dump()


def test_the_example(serve: Serve) -> None:
    client = dressed(serve()).client
    assert client.get("/page/example/portrait").content == pocket.PORTRAIT.read_bytes()
    assert client.get("/page/example/voice").content == SPEECH.read_bytes()
    assert client.get("/page/example/else").status_code == 400


def test_times_of_intents_grow_with_steps_and_are_learnt_from_videos(serve: Serve) -> None:
    now = [1000.0]
    server = serve(clock=lambda: now[0])
    times = Times(server.store, MODELS)
    add_page(server.app, PageParts(times))

    def asked(seconds: float = 6.0) -> dict[str, Any]:
        return server.client.post("/page/times", json={"seconds": seconds}).json()

    first = asked()
    assert [each["steps"] for each in first["times"].values()] == [2, 4, 6]
    assert {each["compute_seconds"] for each in first["times"].values()} == {None}
    times.begin("pocket")
    assert asked()["measuring"]
    times.finish("pocket", lambda plan: len(plan.windows) * plan.steps / 2)
    measured = asked()
    assert not measured["measuring"]
    assert [each["compute_seconds"] for each in measured["times"].values()] == [5.0, 10.0, 15.0]
    server.create()
    claim = server.claim()
    now[0] += 8.0
    server.finish(claim)  # one window of four steps: 2 by the measurement, 8 in truth
    assert [each["compute_seconds"] for each in asked()["times"].values()] == [20.0, 40.0, 60.0]
    estimate = server.client.post("/v1/videos/estimate", data={"prompt": "x"}, files=FILES).json()
    assert estimate["compute_seconds"] == pytest.approx(8.0)


@pytest.mark.parametrize(
    "values", [{"model": "none"}, {"size": "1x1"}, {"seconds": 0}, {"seconds": 1e9}, {"else": 1}]
)
def test_bad_questions_about_times(serve: Serve, values: dict[str, Any]) -> None:
    answer = dressed(serve()).client.post("/page/times", json=values)
    assert answer.status_code in (400, 404) and answer.json()["error"]["param"] in (*values, None)


def test_the_settings_and_inputs_of_a_video(serve: Serve) -> None:
    server = dressed(serve())
    id = server.create(extra_params='{"num_steps": 2, "audio_scale": 3.0}', seed="7").json()["id"]
    used = server.client.get(f"/page/videos/{id}/settings").json()
    assert used["settings"] == {"num_steps": 2, "audio_scale": 3.0, "seed": 7}
    assert (used["prompt"], used["model"], used["size"]) == ("A man talks", "pocket", "192x192")
    assert used["files"] == ["portrait", "voice"]
    face = server.client.get(f"/page/videos/{id}/portrait")
    assert face.content == FILES["input_reference"][1]
    assert face.headers["content-type"] == "application/octet-stream"
    assert server.client.get(f"/page/videos/{id}/output").status_code in (400, 404, 422)
    assert server.client.get(f"/page/videos/video_{'0' * 32}/settings").status_code == 404


def test_a_text_becomes_sound(serve: Serve, tmp_path: Path) -> None:
    client = dressed(serve(), voice=Beep()).client
    sound = client.post(
        "/v1/audio/speech", json={"input": "hello", "voice": "beep", "response_format": "wav"}
    )
    assert sound.headers["content-type"] == "audio/wav" and sound.content[:4] == b"RIFF"
    wrong: list[dict[str, Any]] = [
        {"input": ""},
        {"input": "x" * 5000},
        {"input": "x", "voice": "alloy"},
        {"input": "x", "response_format": "mp3"},
        {"input": "x", "speed": 9},
    ]
    for values in wrong:
        answer = client.post("/v1/audio/speech", json=values)
        assert answer.status_code == 400 and answer.json()["error"]["param"] in values


def test_without_a_voice_the_answer_says_what_to_install(serve: Serve) -> None:
    answer = dressed(serve()).client.post("/v1/audio/speech", json={"input": "hello"})
    assert (
        answer.status_code == 501 and "pip install 'omniavatar[voice]'" in answer.json()["error"]["message"]
    )


def test_a_portrait_for_the_conversation_is_checked_first(serve: Serve) -> None:
    stage = Stage()
    client = dressed(serve(), talk=stage).client
    bad = client.post("/page/talk", files={"input_reference": ("a.png", b"nothing")})
    assert bad.status_code == 400 and bad.json()["error"]["param"] == "input_reference" and stage.used == b""
    assert client.post("/page/talk", data={"prompt": "x"}).json()["error"]["code"] == "missing_field"
    good = client.post("/page/talk", files={"input_reference": ("a.png", portrait())})
    assert good.json() == {"address": "/talk/"} and stage.used == portrait()


def test_with_keys_the_address_opens_the_page_and_a_cookie_carries_the_key(
    serve: Serve, tmp_path: Path
) -> None:
    server = serve()
    assert page_key(server.keys, tmp_path) is None and not (tmp_path / KEY_FILE).exists()
    server.keys.add("alice", ["videos:read"])
    key = page_key(server.keys, tmp_path)
    assert key is not None and page_key(server.keys, tmp_path) == key, "the same after a restart"
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    client = dressed(server, key=key).client
    assert client.get("/page/info").status_code == 401 and client.get("/v1/videos").status_code == 401
    wrong = client.get("/", params={"key": "guess"}, follow_redirects=False)
    assert wrong.status_code == 303 and "set-cookie" not in wrong.headers
    opened = client.get("/", params={"key": key}, follow_redirects=False)
    cookie = opened.headers["set-cookie"]
    assert opened.headers["location"] == "/" and COOKIE in cookie
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert client.get("/page/info").status_code == 200, "the client of the test keeps cookies"
    assert server.create().status_code == 200
    server.keys.revoke("page")
    assert client.get("/page/info").status_code == 401
    renewed = page_key(server.keys, tmp_path)
    assert renewed not in (None, key) and server.keys.verify(str(renewed)) is not None


@pytest.mark.slow
def test_piper_speaks_offline(tmp_path: Path) -> None:
    voice = PiperVoice.find()
    assert voice is not None, "install the extra voice"
    path = tmp_path / "a.wav"
    voice.speak("Good morning.\nHow are you?", path)
    with wave.open(str(path)) as file:
        seconds = file.getnframes() / file.getframerate()
    assert 1.0 < seconds < 4.0
    with pytest.raises(InputError, match="input: has no words"):
        voice.speak(" ... \x00", path)
