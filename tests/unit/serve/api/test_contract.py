"""Other people's clients against the API: the openai package over a real server, and Schemathesis."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from hypothesis import HealthCheck, given, settings

from omniavatar.serve.api.checks import ProcessChecker
from omniavatar.serve.api.errors import ApiError
from omniavatar.serve.api.reader_processes import begin_readers
from serve_api import MP4, Serve, portrait, voice
from serve_server import listening

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API", "ignore::DeprecationWarning")


def test_the_openai_client_makes_a_video(serve: Serve, tmp_path: Path) -> None:
    server = serve(poll_after_ms=50)
    token = server.keys.add("one", ["videos:read", "videos:write"])
    (tmp_path / "a.png").write_bytes(portrait())
    with listening(server) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=token, max_retries=0)
        video = client.videos.create_and_poll(
            prompt="A woman talks", model="pocket", input_reference=tmp_path / "a.png", extra_body={"seed": 3}
        )
        assert video.status == "completed" and video.progress == 100
        assert client.videos.download_content(video.id).read() == MP4
        assert [each.id for each in client.videos.list(limit=1)] == [video.id]
        assert client.videos.retrieve(video.id).model == "pocket"
        assert client.models.list().data[0].id == "pocket"
        deleted = client.videos.delete(video.id)
        assert deleted.deleted and deleted.object == "video.deleted"
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(video.id)
        with pytest.raises(openai.BadRequestError) as caught:
            client.videos.create(prompt="x", size="9x9", input_reference=tmp_path / "a.png")
        assert caught.value.param == "size"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="oa_x", max_retries=0).videos.list()


def test_sync_returns_the_file(serve: Serve) -> None:
    server = serve()
    with listening(server) as address:
        files = {"input_reference": portrait(), "audio_reference": voice()}
        reply = httpx.post(f"{address}/v1/videos/sync", data={"prompt": "x"}, files=files, timeout=20)
        assert reply.status_code == 200, reply.text
        assert reply.content == MP4 and reply.headers["content-type"] == "video/mp4"
        assert reply.headers["x-model"] == "pocket" and float(reply.headers["x-inference-time-s"]) >= 0
    late = serve(sync_seconds=0.1).client.post("/v1/videos/sync", data={"prompt": "x"}, files=files)
    assert late.status_code == 504 and "goes on" in late.json()["error"]["message"]


@pytest.mark.slow
def test_the_openapi_document_is_kept(serve: Serve) -> None:
    """Requests made from the document never meet a server error; `make stress` runs many more."""
    import schemathesis  # half a second for every process that collects

    schema = schemathesis.openapi.from_asgi("/openapi.json", serve().app, headers={"Host": "127.0.0.1"})

    operations = [each.ok() for each in schema.get_all_operations()]
    assert len(operations) >= 12
    for operation in operations:

        @settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def run(case: schemathesis.Case) -> None:
            case.headers = {**(case.headers or {}), "Host": "127.0.0.1"}
            reply = case.call()
            assert reply.status_code not in (500, 507), (case.path, reply.text)
            if reply.status_code >= 400 and "/ready" not in case.path:
                assert set(reply.json()["error"]) == {"code", "message", "type", "param"}

        run()


def endless(path: Path) -> Path:
    """A sound of 2 GB, which takes seconds to decode; a sparse file."""
    path.write_bytes(voice())
    header = bytearray(path.read_bytes()[:44])
    header[4:8], header[40:44] = (2 * 10**9 + 36).to_bytes(4, "little"), (2 * 10**9).to_bytes(4, "little")
    path.write_bytes(header)
    os.truncate(path, 2 * 10**9 + 44)
    return path


@pytest.mark.slow
def test_a_file_that_takes_too_long_or_kills_its_process_refuses_only_itself(tmp_path: Path) -> None:
    sound, long = tmp_path / "sound", endless(tmp_path / "long")
    sound.write_bytes(voice())
    checker = ProcessChecker(1, 1.0, 10**6, 10**9)
    try:
        checker.start()
        with pytest.raises(ApiError, match="takes too long to decode") as caught:
            checker.check(None, long)
        assert caught.value.param == "audio_reference"
        assert checker.check(None, sound) == (None, pytest.approx(0.5))
    finally:
        checker.close()
    checker = ProcessChecker(1, 60.0, 10**6, 10**9)
    try:
        checker.start()
        before = psutil.Process().children(recursive=True)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(checker.check, None, long)
            busy = next(each for each in wait_busy(before))
            busy.kill()
            with pytest.raises(ApiError, match="cannot be decoded"):
                answer.result(30)
        assert checker.check(None, sound) == (None, pytest.approx(0.5))
    finally:
        checker.close()


def wait_busy(processes: list[psutil.Process]) -> list[psutil.Process]:
    """The processes that used the CPU since the call; waits for the first."""
    used = {each: sum(each.cpu_times()[:2]) for each in processes}
    while True:
        if found := [each for each in processes if sum(each.cpu_times()[:2]) > used[each] + 0.1]:
            return found
        time.sleep(0.02)


def test_the_process_to_fork_from_starts_before_the_first_check(tmp_path: Path) -> None:
    def forked_from() -> list[int]:
        children = psutil.Process().children()
        return [each.pid for each in children if "multiprocessing.forkserver" in " ".join(each.cmdline())]

    begin_readers()
    before = forked_from()
    assert len(before) == 1
    sound = tmp_path / "sound"
    sound.write_bytes(voice())
    checker = ProcessChecker(1, 20.0, 10**6, 60.0)
    try:
        assert checker.check(None, sound) == (None, pytest.approx(0.5))
    finally:
        checker.close()
    assert forked_from() == before


def test_a_file_that_meets_a_bug_of_its_reader_is_refused_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit of the wrong type stands for the bug."""
    sound = tmp_path / "sound"
    sound.write_bytes(voice())
    checker = ProcessChecker(1, 20.0, 10**6, "many")  # type: ignore[arg-type]
    try:
        with pytest.raises(ApiError, match="cannot be decoded") as caught:
            checker.check(None, sound)
        assert caught.value.status == 400 and caught.value.param == "audio_reference"
        assert "a bug in this server" in caplog.text and "TypeError" in caplog.text
    finally:
        checker.close()


def test_bad_files_are_refused_by_field_and_good_ones_are_measured(tmp_path: Path) -> None:
    checker = ProcessChecker(1, 20.0, 10**6, 60.0)
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(portrait())
    bad.write_bytes(portrait()[:100])
    try:
        sound = tmp_path / "sound"
        sound.write_bytes(voice())
        for field, files in (("input_reference", (bad, sound)), ("audio_reference", (good, bad))):
            with pytest.raises(ApiError) as caught:
                checker.check(*files)
            assert caught.value.param == field and str(tmp_path) not in str(caught.value)
        assert checker.check(good, sound) == ((64, 64), pytest.approx(0.5))
    finally:
        checker.close()
