"""The page in headless Chromium with its fake microphone, over both transports."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Route

from browser import NEEDS_CHROMIUM, WAIT_S, chromium
from live_makers import tone
from live_server import gone, served
from media_files import write_audio
from omniavatar.live.limits import Door

pytestmark = [pytest.mark.slow, NEEDS_CHROMIUM]
WEBRTC_ON_LOOPBACK = ("--disable-quic", "--disable-features=WebRtcHideLocalIpsWithMdns")
WATCH = """async () => {
  const video = document.getElementById("video");
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 16;
  const drawn = canvas.getContext("2d", { willReadFrequently: true });
  const audio = new AudioContext();
  await audio.resume();
  const sound = video.srcObject || video.captureStream();
  const meter = audio.createAnalyser();
  meter.fftSize = 1024;
  audio.createMediaStreamSource(sound).connect(meter);
  const samples = new Float32Array(1024), seen = [];
  const begun = performance.now();
  while (performance.now() - begun < 4000) {
    drawn.drawImage(video, 0, 0, 16, 16);
    const light = drawn.getImageData(8, 8, 1, 1).data[0];
    meter.getFloatTimeDomainData(samples);
    const loud = samples.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    seen.push([performance.now() - begun, light, loud]);
    await new Promise((done) => setTimeout(done, 10));
  }
  return seen;
}"""
"""(milliseconds, brightness of the picture, loudness of the sound), every 10 ms for 4 s."""

KEEP_PEERS = """window.peers = [];
window.RTCPeerConnection = class extends RTCPeerConnection {
  constructor(...given) { super(...given); window.peers.push(this); }
};"""
APART = """async () => {
  const apart = [];
  for (let reading = 0; reading < 60; reading++) {
    const at = {};
    for (const [, each] of await window.peers.at(-1).getStats())
      if (each.type === "inbound-rtp") at[each.kind] = each.estimatedPlayoutTimestamp;
    apart.push(at.video - at.audio);
    const settled = apart.slice(-3);
    if (settled.length === 3 && settled.every((each) => Math.abs(each) <= 40)) break;
    await new Promise((done) => setTimeout(done, 250));
  }
  return apart;
}"""
"""Milliseconds by which the sender's time of the picture that is shown is ahead of that of the sound that
plays, as the browser states them, until three in a row are at most 40. It needs seconds on a busy machine."""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with chromium(*WEBRTC_ON_LOOPBACK) as browser:
        context = browser.new_context(permissions=["microphone"])
        context.add_init_script(KEEP_PEERS)
        yield context.new_page()


def live(page: Page, name: str) -> Any:
    return page.evaluate(f"window.live.{name}")


def wait(page: Page, condition: str) -> None:
    """Wait for a condition; the page's policy forbids Playwright's own way."""
    end = time.monotonic() + WAIT_S
    while not page.evaluate(condition):
        assert time.monotonic() < end, (condition, page.text_content("#status"), live(page, "errors"))
        page.wait_for_timeout(50)


def rises(seen: list[list[float]], column: int) -> list[float]:
    """Times at which a column goes above half of its largest value."""
    half = max(row[column] for row in seen) / 2
    pairs = itertools.pairwise(seen)
    return [after[0] for before, after in pairs if before[column] < half <= after[column]]


def offset(seen: list[list[float]]) -> float:
    """Median milliseconds between a beep and the nearest brightening. A browser that was too busy for a while
    needs seconds to bring picture and sound together again."""
    apart = [min(abs(bright - loud) for bright in rises(seen, 1)) for loud in rises(seen, 2)]
    return sorted(apart)[len(apart) // 2]


@pytest.mark.parametrize("transport", ["webrtc", "m4s"])
def test_the_microphone_goes_in_and_frames_with_sound_come_back(page: Page, transport: str) -> None:
    """Chromium's fake microphone beeps once a second. Each beep brightens the frames of its sound."""
    with served(size=64) as server:
        page.goto(server.page())
        page.select_option("#transport", transport)
        page.click("#start")
        wait(page, "window.live.chunks > 15 && document.getElementById('video').currentTime > 1")
        seen = page.evaluate(WATCH)
        assert live(page, "errors") == [] and live(page, "transport") == transport
        assert max(row[1] for row in seen) - min(row[1] for row in seen) > 50, "frames change"
        assert max(row[2] for row in seen) > 0.05, "sound plays"
        readings = [offset(seen)]
        while readings[-1] >= 100 and len(readings) < 4:
            readings.append(offset(page.evaluate(WATCH)))
        assert readings[-1] < 100, readings
        if transport == "webrtc":
            apart = page.evaluate(APART)
            assert all(abs(each) <= 40 for each in apart[-3:]), apart
        assert page.text_content("#delay") not in (None, "-")
        page.click("#interrupt")
        assert server.stage.sessions == 1
        page.reload()
        assert gone(server), "a reload frees the session"
        assert live(page, "state") == "idle"


def test_start_waits_for_the_script(page: Page) -> None:
    """On a busy machine the buttons are drawn long before `page.js` has run; a press then was for nothing."""
    held: list[Route] = []
    with served(size=64) as server:
        page.route("**/page.js*", lambda route: held.append(route))
        page.goto(server.page(), wait_until="commit")
        page.wait_for_selector("#start")
        while not held:
            page.wait_for_timeout(10)
        assert page.is_disabled("#start")
        held[0].continue_()
        page.select_option("#transport", "m4s")
        page.click("#start")
        wait(page, "window.live.chunks > 0")
        page.unroute("**/page.js*")


def test_stop_ends_the_session_and_start_begins_again(page: Page) -> None:
    with served(size=64) as server:
        page.goto(server.page())
        page.uncheck("#microphone")
        page.select_option("#transport", "m4s")
        for _ in range(2):
            page.click("#start")
            wait(page, "window.live.chunks > 3")
            page.click("#stop")
            wait(page, "window.live.state == 'done'")
            assert gone(server)
        assert "stopped" in str(page.text_content("#status"))


def test_a_long_file_follows_as_it_is_shown_and_an_interruption_ends_it(page: Page, tmp_path: Path) -> None:
    """The server, here one with a token, takes two minutes of sound at most; the file has three."""
    write_audio(tmp_path / "talk.wav", tone(180.0, 8000)[None], 8000, "pcm_s16le", "mono")
    with served(size=64, door=Door(True, "a secret")) as server:
        page.goto(server.page("?token=a%20secret"))
        page.uncheck("#microphone")
        page.select_option("#transport", "m4s")
        page.click("#start")
        wait(page, "window.live.state == 'running'")
        page.set_input_files("#file", tmp_path / "talk.wav")
        wait(page, "window.live.last && window.live.last.waiting > 15")
        page.wait_for_timeout(1000)
        assert not live(page, "errors") and live(page, "last.waiting") < 30
        page.click("#interrupt")
        wait(page, "window.live.last.waiting == 0 && !window.live.last.speaking")
        page.wait_for_timeout(500)
        assert live(page, "last.waiting") == 0, "the rest of the file is not sent"
