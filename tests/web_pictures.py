"""Makes the pictures of docs/web.md: `PYTHONPATH=src:tests .venv/bin/python -m web_pictures docs/images`.

It starts the page with the packaged model, makes the example video and looks at it. Takes a few minutes.
A test fails while the pictures are older than the page's files.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page

from browser import chromium, until
from omniavatar.measure.projection import StartCosts, WindowCosts
from omniavatar.measure.times import PartTimes
from omniavatar.serve.page.routes import page_files
from web_server import WebServer

DESK, LOW = {"width": 1280, "height": 960}, {"width": 1280, "height": 760}
PHONE = {"width": 390, "height": 844}
READY = "document.body.dataset.ready === 'yes'"
PLANNED = "document.getElementById('plan-time')?.innerText.includes('≈')"
LONG_S = 900.0
PICTURED = Path(__file__).parent / "data" / "pictured_page.sha256"
"""The page's files when its pictures were made."""
IDLE = PartTimes(
    WindowCosts(0.763, 0.007, 3.25, 0.221, 0.068), StartCosts(0.061, 0.01), tokens=1584, pixels=1511424
)
"""Of the packaged model, on one core of an idle machine; the pictures may be made on a busy one."""


def page_digest() -> str:
    """SHA-256 of all files of the page."""
    digest = hashlib.sha256()
    for name, content in sorted(page_files().items()):
        digest.update(name.encode() + hashlib.sha256(content).digest())
    return digest.hexdigest()


def opened(browser: Browser, address: str, view: dict[str, int], scheme: str) -> Page:
    page = browser.new_context(viewport=view, color_scheme=scheme, device_scale_factor=1.5).new_page()
    page.goto(address)
    until(page, READY)
    page.evaluate("document.querySelectorAll('video, audio').forEach((each) => { each.muted = true; })")
    return page


def make_pictures(folder: Path, server: WebServer, browser: Browser) -> None:
    page = opened(browser, server.address, PHONE, "light")
    until(page, PLANNED)
    page.screenshot(path=folder / "web_phone.png")
    page.close()
    page = opened(browser, server.address, DESK, "light")
    until(page, PLANNED)
    first, last = (page.locator(each).bounding_box() for each in ("#look-card", ".plan"))
    assert first is not None and last is not None
    part = {**first, "height": last["y"] + last["height"] - first["y"]}
    page.screenshot(path=folder / "web_plan.png", clip=part, full_page=True)
    page.click("#make")
    until(page, "player.dataset.state === 'growing' && player.currentTime > 0.5", LONG_S)
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(500)
    page.screenshot(path=folder / "web_running.png")
    until(page, "player.dataset.state === 'done' && player.readyState === 4", LONG_S)
    page.close()
    page = opened(browser, server.address, LOW, "dark")
    until(page, PLANNED)
    page.click("#gallery .thumb")
    until(page, "player.currentTime > 2.5")
    page.evaluate("player.pause()")
    page.mouse.move(5, 5)
    page.wait_for_timeout(4000)
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=folder / "web_done.png")
    page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the PNG files go")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as place, chromium() as browser:
        server = WebServer(Path(place), "--demo")
        server.believe(Path("pocket"), times=IDLE)
        server.start()
        try:
            make_pictures(folder, server, browser)
            PICTURED.write_text(f"{page_digest()}\n")
        finally:
            server.kill()


if __name__ == "__main__":
    main()
