"""`omniavatar web` in headless Chromium, end to end: one server and one browser for the whole file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest
from playwright.sync_api import Browser, Page, Route

import small_pocket
from browser import NEEDS_CHROMIUM, WAIT_S, chromium, serious, shown, until
from omniavatar.assets import pocket
from omniavatar.serve.jobs.store import JobStore
from web_server import WebServer, small_config

pytestmark = [pytest.mark.slow, NEEDS_CHROMIUM]
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
READY = "document.body.dataset.ready === 'yes'"
FRAMES = """async () => {
  const player = document.getElementById("player");
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 32;
  const drawn = canvas.getContext("2d", { willReadFrequently: true });
  const seen = new Set();
  player.loop = true;
  await player.play();
  for (let i = 0; i < 200 && seen.size < 5; i++) {
    drawn.drawImage(player, 0, 0, 32, 32);
    seen.add(drawn.getImageData(0, 0, 32, 32).data.join());
    await new Promise((done) => setTimeout(done, 40));
  }
  player.loop = false;
  return seen.size;
}"""
"""Number of different frames that the player shows."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("web")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[WebServer]:
    config = small_config(folder)
    server = WebServer(folder, "-c", str(config))
    server.believe(config, Path("pocket"))
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(server: WebServer, browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport=DESK, permissions=["camera", "microphone"])
    page = context.new_page()
    page.set_default_timeout(120_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if "Security Policy" in line.text else None)
    page.goto(server.address)
    until(page, READY)
    yield page
    context.close()
    assert problems == []


@pytest.fixture(scope="module")
def face(folder: Path) -> Path:
    """A portrait of the person's own, which the packaged model was not made for."""
    with PIL.Image.open(pocket.PORTRAIT) as image:
        image.transpose(PIL.Image.Transpose.FLIP_TOP_BOTTOM).save(folder / "me.png")
    return folder / "me.png"


@pytest.fixture(scope="module")
def speech(folder: Path) -> Path:
    """Two windows of sound at 64x64, five at 112x64."""
    return small_pocket.write_voice(folder / "talk.wav", 2.5)


def test_upload_plan_run_reload_play_and_use_again(
    page: Page, server: WebServer, face: Path, speech: Path
) -> None:
    page.set_input_files("#portrait-file", face)
    page.set_input_files("#voice-file", speech)
    until(page, "document.getElementById('plan-facts').childElementCount === 6")
    assert "download 1.3B" in shown(page, "#packaged-note") and "photograph" in shown(page, "#packaged-note")
    assert "2.8 s" in shown(page, "#plan-length") and "64 × 64" in shown(page, "#plan-size")
    assert "2 windows × 4 steps" in shown(page, "#plan-work")
    until(page, "document.getElementById('time-best').innerText !== ''")
    costs = [shown(page, f"#time-{name}") for name in ("preview", "balanced", "best")]
    numbers = [float(each.removeprefix("≈ ").removesuffix(" s")) for each in costs]
    assert numbers == sorted(numbers) and len(set(numbers)) == 3, costs
    assert "≈" in shown(page, "#plan-time") and shown(page, "#plan-ready dd")[2] == ":"
    page.check("[name=shape][value='112x64']")
    page.check("[value=preview]")
    until(page, "document.getElementById('plan-work').innerText.includes('2 steps')")
    assert "112 × 64" in shown(page, "#plan-size")
    page.click("text=lively")
    assert page.input_value("#prompt").endswith("lively") and "still" not in page.input_value("#prompt")

    # what the model was not trained for, before the run and while it goes
    until(page, "!document.getElementById('voice-warning').hidden")
    assert "only 0% of it is speech" in shown(page, "#voice-warning")
    assert "give a voice alone" in shown(page, "#voice-warning")
    assert "shows no head" in shown(page, "#portrait-warning")
    page.click("#make")
    until(page, "/window [1-9]/.test(document.getElementById('run-detail').innerText)")
    with server.stopped_worker():
        until(page, "document.getElementById('run-warnings').innerText.includes('give a voice alone')")
        assert "omniavatar download 1.3B" in shown(page, "#run-warnings")
        until(page, "player.dataset.state === 'growing' && player.currentTime > 0")
        until(page, "player.videoWidth === 112")
        page.reload()
        until(page, READY)
        assert page.is_visible("#run") and "window" in shown(page, "#run-detail"), "the run is found again"
        assert page.input_value("#prompt").endswith("lively"), "the form is kept"
    until(page, "player.dataset.state === 'done' && player.readyState === 4")
    assert page.evaluate(FRAMES) >= 5
    assert page.evaluate("[player.videoWidth, player.videoHeight]") == [112, 64]
    assert abs(page.evaluate("player.duration") - 2.8) < 0.1
    assert "give a voice alone" in shown(page, "#gallery li:first-child")
    with page.expect_download() as saved:
        page.click("#gallery a")
    assert saved.value.path().read_bytes()[4:8] == b"ftyp"

    # the settings of a video are used again
    page.fill("#prompt", "something else")
    page.check("[value=best]")
    page.click("#gallery >> text=Use settings")
    until(page, "document.getElementById('plan-facts').childElementCount === 6")
    assert page.input_value("#prompt").endswith("smiling, lively")
    assert page.is_checked("[value=preview]") and page.is_checked("[name=shape][value='112x64']")
    assert shown(page, "#voice-name").startswith("voice") and "192 × 192" in shown(page, "#portrait-name")


def test_errors_stand_beside_their_fields(page: Page, folder: Path) -> None:
    bad = folder / "bad.png"
    bad.write_bytes(b"no picture")
    page.set_input_files("#portrait-file", bad)
    until(page, "document.getElementById('portrait-problem').innerText !== ''")
    assert page.get_attribute("#portrait-file", "aria-invalid") == "true"
    page.click("#portrait-example")
    until(page, "document.getElementById('portrait-problem').innerText === ''")
    page.click("#advanced > summary")
    page.fill("#set-num_steps", "many")
    until(page, "document.getElementById('problem-num_steps').innerText !== ''")
    page.fill("#set-num_steps", "")
    until(page, "document.getElementById('problem-num_steps').innerText === ''")
    page.fill("#prompt", "")
    page.click("#make")
    assert (
        "words" in shown(page, "#prompt-problem") and page.evaluate("document.activeElement.id") == "prompt"
    )
    page.click("text=smiling")
    assert shown(page, "#prompt-problem") == ""


def test_camera_microphone_and_text(page: Page) -> None:
    page.click("#camera-open")
    page.click("#camera-take")
    until(page, "document.getElementById('portrait-name').innerText.startsWith('camera.png')")
    page.check("[name=voice-from][value=record]")
    page.click("#record")
    until(page, "document.getElementById('record-time').innerText === '0:02'")
    page.click("#record")
    until(page, "document.getElementById('voice-name').innerText.startsWith('recording.webm')")
    until(page, "document.getElementById('plan-facts').childElementCount === 6")
    assert shown(page, "#voice-problem") == ""
    page.check("[name=voice-from][value=text]")
    page.fill("#speech-text", "Good morning.")
    page.click("#speak")
    until(page, "document.getElementById('voice-name').innerText.startsWith('speech.wav')")
    until(page, "Math.abs(document.getElementById('voice-audio').duration - 1.2) < 0.9")


def test_cancel_by_keyboard_alone(page: Page, server: WebServer, folder: Path) -> None:
    """From the top of the page to a running video and its end, with Tab, arrows, Space and Enter.

    The video is long, and waits while the queue is tried, so that it is not finished before it is cancelled.
    """
    page.goto(server.address)
    until(page, READY)
    kept = page.locator("#gallery li").count()
    reach(page, "portrait-example")
    page.keyboard.press("Enter")
    until(page, "!document.getElementById('portrait-image').hidden")
    reach(page, "voice-example")
    page.keyboard.press("Space")
    page.set_input_files("#voice-file", small_pocket.write_voice(folder / "long.wav", 40))
    until(page, "document.getElementById('plan-length')?.innerText.includes('40')")
    reach(page, None, "preview")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.is_checked("[value=best]")
    reach(page, "make")
    until(page, "document.getElementById('plan-facts').childElementCount === 6")
    page.keyboard.press("Enter")
    until(page, "document.activeElement.id === 'stage-title'")
    until(page, "document.getElementById('run-detail').innerText.includes('step')")
    with server.stopped_worker():
        page.focus("#make")
        page.keyboard.press("Enter")
        until(page, "document.activeElement.id === 'stage-title'")
        until(page, "document.getElementById('queue').innerText.includes('number 1 in the queue')")
        page.focus("#queue button")
        page.keyboard.press("Enter")
        until(page, "document.activeElement.id === 'stage-title'")
        until(page, "document.getElementById('queue-card').hidden")
        assert page.is_visible("#run"), "the first one goes on"
        reach(page, "run-cancel")
        page.keyboard.press("Enter")
        until(page, "document.getElementById('run-text').innerText.startsWith('Cancelling')")
    until(page, "document.getElementById('stage-problem').innerText === 'Cancelled'")
    assert shown(page, "#gallery li:first-child").startswith("Cancelled")
    page.click("#gallery li:first-child >> text=Delete")
    page.click("text=Really delete?")
    until(page, f"document.querySelectorAll('#gallery li').length === {kept}")


def reach(page: Page, id: str | None, value: str = "") -> None:
    """Press Tab until the focus is on an element; for radio buttons, on one of its group."""
    for _ in range(60):
        page.keyboard.press("Tab")
        active = page.evaluate("[document.activeElement.id, document.activeElement.name]")
        if active[0] == id or (value and active[1] == "intent"):
            break
    else:
        raise AssertionError(f"Tab does not reach {id or value}")
    if value:
        assert page.evaluate("document.activeElement.value") in ("preview", "balanced", "best")
        page.keyboard.press("Home")
        while page.evaluate("document.activeElement.value") != value:
            page.keyboard.press("ArrowLeft")


def test_a_worker_that_does_not_start_is_shown(browser: Browser, server: WebServer) -> None:
    context = browser.new_context()
    page = context.new_page()
    waiting = {"id": f"video_{'0' * 32}", "status": "queued", "prompt": "x", "progress": 0, "windows": 0}
    page.route("**/v1/videos?limit=*", lambda route: route.fulfill(json={"data": [waiting]}))
    page.route("**/events", lambda route: route.abort())
    state = {"ready": False, "problem": "no memory; close something"}
    page.route("**/page/worker", lambda route: route.fulfill(json=state))
    page.goto(server.address)
    until(page, "document.getElementById('stage-problem').innerText.includes('close something')")
    assert shown(page, "#run-text") == "The worker is starting"
    context.close()


def test_the_focus_stays_where_a_person_put_it(browser: Browser, server: WebServer) -> None:
    """While lists are drawn again, and when an answer comes late."""
    page = browser.new_context().new_page()
    common = {"progress": 1, "windows": 0, "created_at": 0, "seconds": "1", "size": "64x64"}
    states = {"second": "queued", "first": "queued", "now": "in_progress", "old": "completed"}
    videos = [
        {"id": f"video_{name}", "prompt": name, "status": state, **common} for name, state in states.items()
    ]
    page.route("**/v1/videos?limit=*", lambda route: route.fulfill(json={"data": videos}))
    page.route("**/events", lambda route: route.abort())
    late: list[Route] = []
    page.route("**/v1/videos/video_second/cancel", lambda route: late.append(route))
    deleted = {"id": "video_second", "deleted": True}
    page.route("**/v1/videos/video_second", lambda route: route.fulfill(json=deleted))
    refresh = "dispatchEvent(new Event('online'))"
    name = "document.activeElement.getAttribute('aria-label')"
    page.goto(server.address)
    until(page, "document.querySelectorAll('#queue li').length === 2")
    page.focus("#queue li:nth-child(2) button")
    assert "second" in page.evaluate(name)
    del videos[1]
    page.evaluate(refresh)
    until(page, "document.getElementById('queue').innerText.includes('second number 1')")
    assert "second" in page.evaluate(name)
    page.keyboard.press("Enter")
    while not late:
        page.wait_for_timeout(20)
    page.focus("#prompt")
    del videos[0]
    cancelled = {"status": "failed", "error": {"code": "cancelled", "message": "the job was cancelled"}}
    late[0].fulfill(json={"id": "video_second", **cancelled})
    until(page, "document.getElementById('queue-card').hidden")
    assert page.evaluate("document.activeElement.id") == "prompt"

    page.click("#video_old .danger")
    assert shown(page, "#video_old .danger") == "Really delete?" and page.evaluate(name) is None
    page.focus("#prompt")
    assert shown(page, "#video_old .danger") == "Delete"
    assert "old" in (page.get_attribute("#video_old .danger", "aria-label") or "")
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", [DESK, PHONE], ids=["1280", "390"])
def test_axe_has_no_serious_finding(
    server: WebServer, browser: Browser, scheme: str, view: dict[str, int]
) -> None:
    context = browser.new_context(viewport=view, color_scheme=scheme)
    page = context.new_page()
    page.goto(server.address)
    until(page, READY)
    page.click("#portrait-example")
    page.click("#voice-example")
    until(page, "document.getElementById('plan-facts').childElementCount === 6")
    page.click("#advanced > summary")
    page.click("#fixed > summary")
    assert "crf" in shown(page, "#fixed-settings") and "--hp" in shown(page, "#fixed")
    page.evaluate("document.getElementById('packaged-note').hidden = false")
    assert page.evaluate("document.documentElement.scrollWidth") <= view["width"]
    assert serious(page) == []
    page.click("#tab-talk")
    assert serious(page) == []
    context.close()


def test_talk_opens_the_live_page_in_the_same_process(page: Page, server: WebServer) -> None:
    page.click("#tab-talk")
    assert page.is_hidden("#talk-note")
    page.click("#talk-start")
    frame = page.frame_locator("#talk-frame")
    frame.locator("#transport").select_option("m4s")
    frame.locator("#start").click()
    talk = next(each for each in page.frames if each.url.endswith("/talk/"))
    ends = time.monotonic() + WAIT_S
    while not talk.evaluate("window.live.chunks"):
        said = talk.inner_text("#status"), talk.evaluate("window.live")
        assert time.monotonic() < ends and said[1]["errors"] == [], said
        page.wait_for_timeout(100)
    assert serious(page) == []
    frame.locator("#stop").click()
    page.click("#tab-make")


def test_a_killed_server_goes_on_after_its_start(page: Page, server: WebServer, speech: Path) -> None:
    """The page that was open all the time finds the new server and its video."""
    page.goto(server.address)
    until(page, READY)
    page.click("#portrait-example")
    page.set_input_files("#voice-file", speech)
    page.check("[name=shape][value='112x64']")
    until(page, "document.getElementById('plan-facts').childElementCount === 6")
    page.click("#make")
    until(page, "/window [1-4].5/.test(document.getElementById('run-detail').innerText)")
    server.kill()
    until(page, "!document.getElementById('offline').hidden")
    assert "omniavatar web" in shown(page, "#offline")
    server.start()
    until(page, "document.getElementById('offline').hidden")
    until(page, "player.dataset.state === 'done' && player.readyState === 4")
    assert abs(page.evaluate("player.duration") - 2.8) < 0.1
    with JobStore.open(f"sqlite:///{server.folder / 'data' / 'jobs.db'}") as store:
        (job,) = store.list(limit=1).jobs
    assert job.attempt == 2 and job.resumed_windows >= 1
