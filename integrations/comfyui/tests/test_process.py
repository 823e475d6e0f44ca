"""The engine's process: crashes, ends with its parent, other Pythons. No ComfyUI here."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from comfy_tools import ENGINE_PYTHON, PACKAGE, load, run, values

engine = importlib.import_module("comfyui.omniavatar_nodes.engine")


def nothing(*_: Any) -> None: ...


def test_a_crash_is_one_error_and_the_next_item_starts_a_new_process(model, shown, package, comfy_folders):
    running = package.ENGINES.of(model.python, Path())
    pid = running.pid

    def kill(value: int) -> None:
        if shown.previews and running.pid == pid:
            os.kill(pid, signal.SIGKILL)

    shown.at = kill
    inputs = values(model, 3.0)
    with pytest.raises(Exception) as caught:
        run("Generate", **inputs)
    cause = caught.value.__cause__
    assert type(cause) is engine.EngineError and "\n" not in str(cause)
    assert "ended with SIGKILL (often too little memory); queue it again" in str(cause)
    assert running.pid is None
    shown.values.clear()
    run("Generate", **inputs)
    assert shown.values[0] >= 2 and shown.values[-1] == 18, "finished windows are kept"
    assert running.pid not in (None, pid)


def test_a_crash_between_two_items(model, package):
    process = psutil.Process(package.ENGINES.of(model.python, Path()).pid)
    process.kill()
    psutil.wait_procs([process], timeout=20)
    run("Generate", **values(model, 0.3, seed=60))


def test_a_bug_is_named_with_its_log_and_ends_the_process(tmp_path):
    one = engine.Engine(ENGINE_PYTHON, tmp_path / "log")
    with pytest.raises(engine.EngineError, match="omniavatar failed: KeyError: 'dance'; this is a bug"):
        one.order({"do": "dance"}, nothing, nothing)
    assert one.pid is None and "Traceback" in (tmp_path / "log").read_text()
    one.close()


def test_a_python_without_the_package(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH")
    one = engine.Engine(sys.executable, tmp_path / "log")
    with pytest.raises(engine.EngineError, match=r"the package omniavatar is missing for .*-m pip install"):
        one.order({"do": "open"}, nothing, nothing)
    assert one.pid is None


def test_an_older_package(tmp_path, monkeypatch):
    (tmp_path / "omniavatar").mkdir()
    (tmp_path / "omniavatar" / "__init__.py").write_text(
        "__version__ = '0.0.9'\n__all__ = ['AvatarPipeline']\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    one = engine.Engine(ENGINE_PYTHON, tmp_path / "log")
    with pytest.raises(engine.EngineError, match=r"omniavatar 0\.0\.9 of .* lacks AvatarRequest"):
        one.order({"do": "open"}, nothing, nothing)


@pytest.mark.parametrize(
    "content, text", [("#!/bin/sh\nexit 3\n", "exit code 3"), ("no program", "cannot be started")]
)
def test_something_that_is_no_python(tmp_path, content, text):
    program = tmp_path / "python"
    program.write_text(content)
    program.chmod(0o755)
    with pytest.raises(engine.EngineError, match=text):
        engine.Engine(str(program), tmp_path / "log").order({"do": "open"}, nothing, nothing)


def test_which_python(monkeypatch, tmp_path):
    monkeypatch.setenv("OMNIAVATAR_PYTHON", ENGINE_PYTHON)
    assert engine.choose_python("") == ENGINE_PYTHON
    assert engine.choose_python(sys.executable) == sys.executable
    monkeypatch.delenv("OMNIAVATAR_PYTHON")
    assert engine.choose_python(" ") == sys.executable
    with pytest.raises(engine.EngineError, match=f"python: {tmp_path} is no program"):
        engine.choose_python(str(tmp_path))
    monkeypatch.setenv("OMNIAVATAR_PYTHON", "/no/python")
    with pytest.raises(engine.EngineError, match="OMNIAVATAR_PYTHON: /no/python is no program"):
        engine.choose_python("")


def test_another_python_ends_the_first_process(tmp_path):
    link = tmp_path / "other"
    link.write_text(f'#!/bin/sh\nexec "{ENGINE_PYTHON}" "$@"\n')
    link.chmod(0o755)
    pair = engine.Engines()
    first = pair.of(ENGINE_PYTHON, tmp_path / "log")
    with pytest.raises(engine.EngineError):
        first.order({"do": "dance"}, nothing, nothing)
    first._start()
    pid = first.pid
    second = pair.of(str(link), tmp_path / "log")
    assert second is not first and not psutil.pid_exists(pid)
    pair.close()


PARENT = f"""
import importlib.util, os, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("engine", {str(PACKAGE / "omniavatar_nodes" / "engine.py")!r})
engine = importlib.util.module_from_spec(spec); spec.loader.exec_module(engine)
engines = engine.Engines()
one = engines.of({ENGINE_PYTHON!r}, Path(sys.argv[1]))
model = dict(weights="pocket", scale="", settings="device=cpu")
one.order(dict(do="open", model=model), lambda reply: None, lambda: None)
if sys.argv[2] == "fork" and os.fork() == 0:  # it inherits the pipe to the engine
    time.sleep(60); os._exit(0)
print(one.pid, flush=True)
if sys.argv[2] != "exit":
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["exit", "kill", "fork"])
def test_the_process_ends_with_its_parent(tmp_path, how):
    command = [sys.executable, "-c", PARENT, str(tmp_path / "log"), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        if how != "exit":
            parent.kill()
        psutil.wait_procs([worker], timeout=40)
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
        if how == "fork":
            os.killpg(parent.pid, signal.SIGKILL)


def test_a_run_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    """A step may hang in a driver; the next item must not wait for it."""
    monkeypatch.setattr(engine, "STOP_S", 1.0)
    one = engine.Engine(ENGINE_PYTHON, tmp_path / "log")
    with pytest.raises(engine.EngineError):
        one.order({"do": "dance"}, nothing, nothing)
    one._start()
    pid = one.pid
    os.kill(pid, signal.SIGSTOP)
    begun = time.monotonic()

    def interrupt() -> None:
        if time.monotonic() > begun + 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.order({"do": "open", "model": {}}, nothing, interrupt)
    assert one.pid is None and time.monotonic() - begun < 20
    one.close()


def test_orders_of_two_threads_wait_for_each_other(model, package):
    made: list[str] = []
    threads = [
        threading.Thread(
            target=lambda seed=seed: made.append(run("Generate", **values(model, 0.3, seed=seed))[1])
        )
        for seed in (70, 71)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 2 and all(Path(path).is_file() for path in made)


def test_the_model_of_an_order_is_opened_where_the_process_is_new(model, package, checkpoint, cache):
    """ComfyUI gives the Load node's cached output to the next item, also after the process has ended."""
    package.ENGINES.close()
    run("Generate", **values(model, 0.3, seed=80))
    other = load(checkpoint, cache, settings=model.settings + "\ncrf=40")
    assert (
        run("Generate", **values(other, 0.3, seed=80))[1] != run("Generate", **values(model, 0.3, seed=80))[1]
    )
