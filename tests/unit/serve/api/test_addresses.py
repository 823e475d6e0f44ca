"""URLs from outside lead to no private address; webhooks are signed, retried and survive a restart."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from standardwebhooks.webhooks import Webhook

from omniavatar.serve.api.addresses import AddressError, Outside, checked_url, is_public
from omniavatar.serve.api.webhooks import Webhooks, secret_of
from serve_api import Serve, portrait, voice
from web_site import Site
from web_site import site as site


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "0.0.0.0",
        "100.64.0.1",
        "224.0.0.1",
        "::1",
        "fe80::1%eth0",
        "fd00::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
        "2002:a00:1::",
        "ff02::1",
        "255.255.255.255",
        "::",
    ],
)
def test_private_addresses(address: str) -> None:
    assert not is_public(address)


def test_public_addresses() -> None:
    assert all(map(is_public, ("93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34")))


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://x/", "http://", "http://a:b@x/", "http://x:0/", "http://[::1", "gopher://x",
     "http://x/ y", "http://x:99999/"],
)  # fmt: skip
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(AddressError):
        checked_url(url)


@pytest.mark.parametrize("found", [["127.0.0.1"], ["93.184.216.34", "10.0.0.1"], ["::ffff:127.0.0.1"], []])
def test_a_name_that_leads_inside_is_refused(tmp_path: Path, found: list[str]) -> None:
    with pytest.raises(AddressError, match="private"):
        Outside(resolver=lambda host, port: found).fetch("http://x.example/", tmp_path / "x", 100, 5.0)


def test_a_name_is_resolved_once_for_a_connection(tmp_path: Path, site: Site) -> None:
    """The address that was checked is the one connected to, whatever the name means later."""
    asked: list[str] = []

    def resolver(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if host == "first.example" else ["no address"]

    outside = Outside(private=True, resolver=resolver)
    assert outside.fetch(f"http://first.example:{site.port}/a.png", tmp_path / "x", 10**6, 5.0) == len(
        portrait()
    )
    assert asked == ["first.example"]
    with pytest.raises(AddressError, match="more than 100 bytes"):
        outside.fetch(f"http://first.example:{site.port}/b", tmp_path / "x", 100, 5.0)


def test_a_redirect_is_checked_too(tmp_path: Path, site: Site) -> None:
    asked: list[str] = []

    def resolver(host: str, port: int) -> list[str]:
        asked.append(host)
        if host == "private.example":
            raise OSError("not known")
        return ["127.0.0.1"]

    with pytest.raises(AddressError, match="not known"):
        outside = Outside(private=True, resolver=resolver)
        outside.fetch(f"http://first.example:{site.port}/away", tmp_path / "x", 100, 5.0)
    assert asked == ["first.example", "private.example"]


def test_url_inputs_are_off_by_default(serve: Serve, site: Site) -> None:
    fields = {"prompt": "x", "input_reference": f"http://127.0.0.1:{site.port}/a.png"}
    sound = {"audio_reference": ("a.wav", voice())}
    off = serve().client.post("/v1/videos", data=fields, files=sound).json()["error"]
    assert off["param"] == "input_reference" and "off" in off["message"]
    guarded = serve(url_inputs=True).client.post("/v1/videos", data=fields, files=sound).json()["error"]
    assert guarded["code"] == "invalid_url" and "private" in guarded["message"]
    allowed = serve(url_inputs=True, private_urls=True).client.post("/v1/videos", data=fields, files=sound)
    assert allowed.status_code == 200, allowed.text


SECRET = "s" * 32


def test_a_webhook_is_signed_and_retried(serve: Serve, site: Site) -> None:
    times = [1_700_000_000.0]
    server = serve(webhook_secret=SECRET, clock=lambda: times[0])
    id = server.create(webhook_url=f"http://127.0.0.1:{site.port}/hook").json()["id"]
    outside = Outside(private=True)
    hooks = Webhooks(server.store, outside, SECRET, tries=3)
    assert hooks.turn() == 0 and not site.posts, "the job has not ended"
    server.finish()
    site.status = 500
    assert hooks.turn() == 0 and len(site.posts) == 1
    assert hooks.turn() == 0 and len(site.posts) == 1, "it waits before the next try"
    site.status = 204
    times[0] = time.time()
    restarted = Webhooks(server.store, outside, SECRET, tries=3)
    assert restarted.turn() == 1 and restarted.turn() == 0 and len(site.posts) == 2
    headers, body = site.posts[1]
    event = Webhook(secret_of(SECRET, "local")).verify(body, headers)
    assert event["type"] == "video.completed" and event["data"] == {"id": id}
    assert site.posts[0][0]["webhook-id"] == headers["webhook-id"]


def test_a_webhook_never_goes_to_a_private_address(serve: Serve, site: Site) -> None:
    server = serve(webhook_secret=SECRET)
    server.create(webhook_url=f"http://127.0.0.1:{site.port}/hook")
    server.finish()
    hooks = Webhooks(server.store, Outside(), SECRET, tries=1)
    assert hooks.turn() == 0 and not site.posts


def test_a_refused_request_leaves_no_webhook(serve: Serve) -> None:
    server = serve(webhook_secret=SECRET, queue_length=1)
    server.create()
    assert server.create(webhook_url="http://x.example/").status_code == 503
    with server.store.database.reading() as connection:
        from omniavatar.serve.jobs.tables import webhooks

        assert not connection.execute(webhooks.select()).all()
    assert secret_of(SECRET, "one") != secret_of(SECRET, "two")
