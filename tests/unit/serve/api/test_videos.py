"""The routes of videos, with a client of the test and the real store."""

from __future__ import annotations

import base64
import json

import pytest

from omniavatar.serve.jobs.records import VIDEO, JobError, JobProgress
from serve_api import FILES, MP4, Serve, portrait, voice


def test_a_video_from_upload_to_content(serve: Serve) -> None:
    server = serve()
    created = server.create(seed="3", num_inference_steps="2", extra_params='{"audio_scale": 2.0}')
    assert created.status_code == 200, created.text
    body = created.json()
    assert (body["object"], body["status"], body["progress"], body["model"]) == (
        "video",
        "queued",
        0,
        "pocket",
    )
    assert created.headers["openai-poll-after-ms"] == "1000" and created.headers["x-request-id"]
    id = body["id"]
    spec = server.store.get(id).spec
    assert dict(spec.settings) == {"audio_scale": 2.0, "seed": 3, "num_steps": 2}
    waiting = server.client.get(f"/v1/videos/{id}/content")
    assert waiting.status_code == 404 and waiting.json()["error"]["code"] == "video_not_ready"
    server.finish()
    done = server.client.get(f"/v1/videos/{id}")
    assert done.json()["status"] == "completed" and done.json()["seconds"] == "0.8"
    assert "openai-poll-after-ms" not in done.headers
    content = server.client.get(f"/v1/videos/{id}/content")
    assert content.content == MP4 and content.headers["content-type"] == "video/mp4"
    part = server.client.get(f"/v1/videos/{id}/content", headers={"Range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == MP4[10:20]
    assert server.client.get(f"/v1/videos/{id}/content", params={"variant": "partial"}).content == MP4
    deleted = server.client.delete(f"/v1/videos/{id}")
    assert deleted.json() == {"id": id, "object": "video.deleted", "deleted": True}
    assert server.client.get(f"/v1/videos/{id}").status_code == 404
    assert not server.folders


def test_a_json_body_has_data_urls(serve: Serve) -> None:
    server = serve()
    urls = [f"data:x/y;base64,{base64.b64encode(data).decode()}" for data in (portrait(), voice())]
    body = {"prompt": "x", "input_reference": {"image_url": urls[0]}, "audio_reference": urls[1]}
    created = server.client.post("/v1/videos", json={**body, "extra_params": {"seed": 1}})
    assert created.status_code == 200, created.text
    id = created.json()["id"]
    assert server.files.open(id, "input/portrait").read() == portrait()


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"extra_params": '{"dit_path": "/etc/passwd"}'}, "extra_params.dit_path", "cannot be set"),
        ({"extra_params": "[1]"}, "extra_params", "dictionary"),
        ({"extra_params": "{"}, "extra_params", "not valid JSON"),
        ({"extra_params": '{"num_steps": 1000}'}, "extra_params.num_steps", "at most 100"),
        ({"num_inference_steps": "0"}, "num_inference_steps", "greater than or equal"),
        ({"seed": "x"}, "seed", "integer"),
        ({"size": "1x1"}, "size", "choose from"),
        ({"model": "sora"}, "model", "choose one"),
        ({"prompt": " "}, "prompt", "describe"),
        ({"unknown": "1"}, "unknown", "remove it"),
        ({"webhook_url": "http://x.example/"}, "webhook_url", "webhooks are off"),
        ({"guidance_scale": "nan"}, "guidance_scale", "must be"),
        ({"input_reference": "http://x.example/a.png"}, "input_reference", "once"),
    ],
)
def test_a_wrong_field_is_named(serve: Serve, change: dict[str, str], param: str, words: str) -> None:
    server = serve()
    reply = server.create(**change)
    error = reply.json()["error"]
    assert reply.status_code in (400, 404) and error["param"] == param and words in error["message"], error
    assert set(error) == {"code", "message", "type", "param"}
    assert server.store.unfinished() == 0


@pytest.mark.parametrize(
    ("field", "data", "words"),
    [
        ("input_reference", b"no picture", "not an image"),
        ("input_reference", voice(), "swapped"),
        ("input_reference", b"", "empty"),
        ("input_reference", portrait(400), "make it smaller"),
        ("audio_reference", b"no sound", "audio"),
        ("audio_reference", voice(3.0), "longer than 2 s; cut it"),
    ],
)
def test_a_bad_file_names_its_field(serve: Serve, field: str, data: bytes, words: str) -> None:
    server = serve(portrait_pixels=100_000, voice_seconds=2.0)
    reply = server.client.post("/v1/videos", data={"prompt": "x"}, files={**FILES, field: ("../../x", data)})
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == field and words in error["message"], error
    assert "/tmp" not in error["message"] and "upload" not in error["message"]
    assert not server.folders


def test_the_list_has_pages(serve: Serve) -> None:
    server = serve()
    ids = [server.create().json()["id"] for _ in range(3)]
    first = server.client.get("/v1/videos", params={"limit": 2, "order": "asc"}).json()
    assert [each["id"] for each in first["data"]] == ids[:2] and first["has_more"]
    rest = server.client.get("/v1/videos", params={"after": first["last_id"], "order": "asc"}).json()
    assert [each["id"] for each in rest["data"]] == ids[2:] and not rest["has_more"]
    assert server.client.get("/v1/videos", params={"limit": 101}).status_code == 400
    assert server.client.get("/v1/videos", params={"after": "../x"}).json()["error"]["param"] == "after"


def test_an_idempotency_key_gives_the_same_job(serve: Serve) -> None:
    server = serve()
    headers = {"Idempotency-Key": "one"}
    first, again = (server.create(headers=headers).json()["id"] for _ in range(2))
    assert first == again and server.store.unfinished() == 1
    other = server.create(headers=headers, seed="9")
    assert other.status_code == 409 and other.json()["error"]["code"] == "idempotency_conflict"
    assert len(server.folders) == 1


def test_the_priority_orders_the_videos_of_a_key(serve: Serve) -> None:
    server = serve()
    ids = [server.create(**fields).json()["id"] for fields in ({}, {"priority": "7"}, {"priority": "-1"})]
    assert [server.claim().job.id for _ in ids] == [ids[1], ids[0], ids[2]]
    refused = server.create(priority="101")
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "priority"


def test_an_estimate_accepts_nothing(serve: Serve) -> None:
    server = serve()
    server.create()
    reply = server.client.post("/v1/videos/estimate", data={"prompt": "x"}, files=FILES).json()
    assert reply["queue_position"] == 1 and reply["windows"] >= 1 and reply["seconds"] > 0.5
    assert reply["compute_seconds"] is None
    server.finish()
    reply = server.client.post("/v1/videos/estimate", data={"prompt": "x"}, files=FILES).json()
    assert reply["queue_position"] == 0 and reply["compute_seconds"] > 0
    assert server.store.unfinished() == 0


def test_a_running_job_is_cancelled(serve: Serve) -> None:
    server = serve()
    id = server.create().json()["id"]
    claim = server.claim()
    reply = server.client.delete(f"/v1/videos/{id}")
    assert reply.status_code == 202 and reply.json()["deleted"] is False
    assert server.store.heartbeat(claim, JobProgress()).cancel
    server.store.release(claim)
    failed = server.client.get(f"/v1/videos/{id}").json()
    assert failed["status"] == "failed" and failed["error"]["code"] == "cancelled"
    assert server.client.get(f"/v1/videos/{id}/content").status_code == 422
    assert server.client.delete(f"/v1/videos/{id}").json()["deleted"] is True


def test_cancel_keeps_a_video_that_has_just_finished(serve: Serve) -> None:
    """Both answers of the race: a client that asks to cancel never loses a finished video."""
    server = serve()
    id = server.create().json()["id"]
    claim = server.claim()
    asked = server.client.post(f"/v1/videos/{id}/cancel")
    assert asked.status_code == 202 and asked.json()["status"] == "in_progress"
    server.finish(claim)  # the worker was done before it heard of it
    for _ in range(2):
        kept = server.client.post(f"/v1/videos/{id}/cancel")
        assert kept.status_code == 200 and kept.json()["status"] == "completed"
        assert server.client.get(f"/v1/videos/{id}/content").content == MP4
    assert server.client.delete(f"/v1/videos/{id}").json()["deleted"] is True
    assert server.client.post(f"/v1/videos/{id}/cancel").status_code == 404


def test_a_waiting_video_is_cancelled_at_once(serve: Serve) -> None:
    server = serve()
    id = server.create().json()["id"]
    work = server.files.work(id)
    work.parent.mkdir(parents=True)
    work.write_bytes(b"a finished window")
    for _ in range(2):
        reply = server.client.post(f"/v1/videos/{id}/cancel")
        assert reply.status_code == 200 and reply.json()["error"]["code"] == "cancelled"
    assert not work.exists() and server.store.claim("test", ["pocket"], 60.0) is None


def test_the_growing_file_and_events(serve: Serve) -> None:
    server = serve()
    id = server.create().json()["id"]
    none = server.client.get(f"/v1/videos/{id}/content", params={"variant": "partial"})
    assert none.status_code == 404
    claim = server.claim()
    path = server.files.work(id).with_name("video.partial.mp4")
    path.parent.mkdir(parents=True)
    path.write_bytes(MP4[:100])
    snapshot = server.client.get(f"/v1/videos/{id}/content", params={"variant": "partial", "follow": False})
    assert snapshot.content == MP4[:100] and snapshot.headers["accept-ranges"] == "none"
    server.finish(claim)
    text = server.client.get(f"/v1/videos/{id}/events").text
    kinds = [line for line in text.splitlines() if line.startswith("event:")]
    assert kinds == ["event: status", "event: status", "event: progress", "event: status"]
    data = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert data[2]["windows"] == 1 and data[-1]["status"] == "completed"
    rest = server.client.get(f"/v1/videos/{id}/events", headers={"Last-Event-ID": "3"}).text
    assert rest.count("event:") == 1 and '"completed"' in rest
    assert server.client.get(f"/v1/videos/{id}/events", headers={"Last-Event-ID": "x"}).status_code == 400


def test_an_extension_continues_a_finished_video(serve: Serve) -> None:
    server = serve()
    id = server.create(seed="5").json()["id"]
    more = {"audio_reference": ("b.wav", voice())}
    early = server.client.post(f"/v1/videos/{id}/extensions", files=more)
    assert early.status_code == 409
    server.finish()
    reply = server.client.post(f"/v1/videos/{id}/extensions", files=more)
    assert reply.status_code == 200, reply.text
    body = reply.json()
    job = server.store.get(body["id"])
    assert body["remixed_from_video_id"] == job.spec.extends == id
    assert dict(job.spec.settings) == {"seed": 5} and job.spec.prompt == "A man talks"
    assert server.files.open(job.id, "input/portrait").read() == portrait()
    reply = server.client.post(f"/v1/videos/{id}/extensions", data={"prompt": "x"}, files={"x": b""})
    assert reply.status_code == 400


def test_a_failed_job_shows_its_error(serve: Serve) -> None:
    server = serve()
    id = server.create().json()["id"]
    server.store.fail(server.claim(), JobError("invalid_input", "bad", "invalid_request_error"), retry=False)
    assert server.client.get(f"/v1/videos/{id}").json()["error"]["message"] == "bad"
    content = server.client.get(f"/v1/videos/{id}/content")
    assert content.status_code == 422 and content.json()["error"]["code"] == "invalid_input"
    assert server.files.size(id, VIDEO) is None
