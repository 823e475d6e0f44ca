"""Headless Chromium for tests of pages. Their policy forbids `wait_for_function`, which evaluates text."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
NEEDS_CHROMIUM = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
]
WAIT_S = 180.0


@contextmanager
def chromium(*flags: str) -> Iterator[Browser]:
    """A browser with a fake camera and a fake microphone. flags: further options of the command."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*FLAGS, *flags], env=dict(os.environ), timeout=WAIT_S * 1000
        )
        yield browser
        browser.close()


def until(page: Page, condition: str, seconds: float = WAIT_S) -> None:
    """Wait until an expression of JavaScript is true."""
    ends = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < ends, (condition, page.evaluate("document.body.innerText")[-3000:])
        page.wait_for_timeout(50)


def shown(page: Page, selector: str) -> str:
    """The visible text of an element."""
    return page.inner_text(selector)


def serious(page: Page) -> list[str]:
    """Serious and critical findings of axe-core, one line each."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{each['id']} ({each['impact']}): {node['html'][:160]}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
