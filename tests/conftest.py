"""For every test: which are slow or need a GPU, and one nano checkpoint for the whole run.

`make check` leaves out tests marked `slow`: those that start Python processes, and those that take more than
about 2 s. Tests that use a fixture of `SLOW_FIXTURES` have the mark by that, the others by hand. A test
without it fails when it starts a Python process, or takes more than `MOST_FAST_S`.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from longest_first import LONGEST_FIRST, UNIT

if TYPE_CHECKING:
    from ranks import RankPool


SLOW_FIXTURES = {"heads_checkpoint", "nano_checkpoint", "pools"}
"""Their tests run the pipeline on real files, or in several processes."""
MOST_FAST_S = 10.0
"""Processor time that a test without the mark may take: room for first imports and slow machines."""

settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded; last bits of sums depend on it
gc.disable()  # until all tests are imported: a collection walks through everything that exists

REPOSITORY = Path(__file__).parents[1]
_in_repository = set(os.listdir(REPOSITORY))
_fast_test: str | None = None


def pytest_collection_finish() -> None:
    """Let later collections pass over the modules and the tests; a pipeline that is closed starts one."""
    gc.freeze()
    gc.enable()


def pytest_configure() -> None:
    """One token for every Ray instance of this process, because Ray reads it only once."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", "5eed" * 16)
    sys.addaudithook(_refuse_processes)


def _refuse_processes(event: str, arguments: tuple[object, ...]) -> None:
    if event == "subprocess.Popen" and _fast_test is not None:
        program = os.path.basename(str(arguments[0]))
        assert not program.startswith("python"), f"{_fast_test} starts a Python process: mark it slow"


def _refuse_leftovers() -> None:
    """Fail the test that left something in the repository's folder; caches begin with a dot."""
    new = {name for name in os.listdir(REPOSITORY) if name[0] != "."} - _in_repository
    _in_repository.update(new)
    assert not new, f"left {', '.join(sorted(new))} in the repository's folder: run it in tmp_path"


@pytest.fixture(scope="module", autouse=True)
def modules_of_earlier_tests() -> None:
    """Let collections pass over what earlier files imported and left, after their garbage is gone."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    global _fast_test
    _fast_test = None if item.get_closest_marker("slow") or item.get_closest_marker("gpu") else item.nodeid
    try:
        return (yield)
    finally:
        _fast_test = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    begun = time.process_time()
    result = yield
    taken = time.process_time() - begun
    _refuse_leftovers()
    assert _fast_test is None or taken <= MOST_FAST_S, f"{taken:.1f} s of processor time: mark it slow"
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {UNIT / name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def nano_checkpoint(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder like `pretrained_models/nano`, made once, read-only, and shared by all xdist workers."""
    return _checkpoint("nano", tmp_path_factory, worker_id)


@pytest.fixture(scope="session")
def heads_checkpoint(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The files of FlashHead and LeapTalk at nano size, made once, read-only, and shared like the others."""
    return _checkpoint("leaptalk-nano", tmp_path_factory, worker_id)


def _checkpoint(scale: str, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    from omniavatar.checkpoint.synthetic import make_checkpoint

    base = tmp_path_factory.getbasetemp()
    root = base if worker_id == "master" else base.parent
    folder = root / f"{scale}_checkpoint"
    done = root / f"{scale}_checkpoint.done"
    with FileLock(root / f"{scale}_checkpoint.lock"):
        if not done.is_file():
            make_checkpoint(scale, folder)
            done.touch()
    return folder


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, RankPool]]:
    """Groups of 2 and of 4 processes, kept for the tests of a module."""
    from ranks import RankPool

    folder = tmp_path_factory.mktemp("ranks")
    made = {size: RankPool(size, folder) for size in (2, 4)}
    yield made
    for pool in made.values():
        pool.close()
