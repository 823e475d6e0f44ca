"""The engine's process: orders come as JSON lines on standard input, replies leave on standard output.

The nodes start this file with any Python that has `omniavatar`; nothing of ComfyUI is imported here. The
process ends when its input ends, so also when ComfyUI is killed. Each order has a number. Its last reply has
the kind `done`, `stopped`, `error` (the process goes on) or `bug` (the process ends).
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

NAMES = ("AvatarPipeline", "AvatarRequest", "SamplingParams", "Waveform", "frames_to_video")
"""Public names of omniavatar that must exist; the newest of them is the oldest version that works."""
BUG = 70
"""Exit code after an exception that is a fault of the program."""
LEAVE_S = 30.0
"""Time that a run gets to stop after the input has ended."""
WATCH_S = 1.0


class Wire:
    """Sends replies as JSON lines; threads do not mix their lines."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._lock = stream, threading.Lock()

    def send(self, kind: str, **values: Any) -> None:
        try:
            with self._lock:
                self._stream.write(json.dumps({"kind": kind, **values}) + "\n")
                self._stream.flush()
        except OSError:  # nobody reads any more: the input has ended too, and that ends this process
            return


class Worker:
    """One pipeline, kept between orders; an order with another model closes it and opens that one."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._pipeline: Any = None
        self._model = ""
        self._taken: dict[tuple[Any, ...], float] = {}
        self._number = 0
        self.stop = threading.Event()
        self.busy = threading.Event()

    def carry_out(self, order: Mapping[str, Any]) -> None:
        """Carry out an order and send its last reply. An exception that leaves it is a bug."""
        from omniavatar import OmniAvatarError, StoppedError

        self._number = order["number"]
        act: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            "open": self._open,
            "plan": self._plan,
            "generate": self._generate,
        }
        try:
            value = act[order["do"]](order)
        except StoppedError as error:
            self._reply("stopped", text=str(error))
        except OmniAvatarError as error:
            named = re.sub(r"^(--hp|overrides):", "settings:", str(error))
            self._reply("error", text=named)
        else:
            self._reply("done", value=value)

    def close(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()

    def _reply(self, kind: str, **values: Any) -> None:
        self._wire.send(kind, number=self._number, **values)

    def _open(self, order: Mapping[str, Any]) -> dict[str, Any]:
        from omniavatar import AvatarPipeline

        model = order["model"]
        name = json.dumps(model, sort_keys=True)
        if self._pipeline is None or name != self._model:
            self.close()
            self._pipeline = None
            lines = [line.strip() for line in model["settings"].splitlines()]
            changes = [line for line in lines if line and not line.startswith("#")]
            weights = model["weights"]
            if weights.endswith((".yaml", ".yml")):
                opened = AvatarPipeline.from_config(weights, changes, on_event=self._event)
            else:
                scale = model["scale"] or None
                opened = AvatarPipeline.from_pretrained(weights, changes, scale, on_event=self._event)
            self._pipeline, self._model = opened, name
        sizes = [f"{width}x{height}" for height, width in self._pipeline.config.video.sizes]
        return {"sizes": sizes, "fps": self._pipeline.config.video.fps}

    def _plan(self, order: Mapping[str, Any]) -> dict[str, Any]:
        self._open(order)
        plan = self._pipeline.plan(_request(order["request"]))
        known = self._taken.get(self._kind(plan))
        return {
            **{name: plan[name] for name in ("frames", "windows", "steps", "fps", "duration_s", "size")},
            "device_peak": plan["memory"]["device_peak"],
            "placement": plan["memory"]["choice"],
            "notes": plan["notes"],
            "seconds": None if known is None else known * plan["windows"],
        }

    def _kind(self, plan: Mapping[str, Any]) -> tuple[Any, ...]:
        """What decides the time of a window."""
        return (self._model, *plan["size"], plan["steps"], len(plan["branches"]))

    def _generate(self, order: Mapping[str, Any]) -> dict[str, Any]:
        self._open(order)
        made = self._pipeline.generate(
            _request(order["request"]), order["output"], should_stop=self.stop.is_set
        )
        record = json.loads(Path(made.sidecar).read_text(encoding="utf-8"))
        new = made.windows - made.resumed_windows
        if new and made.seconds:
            self._taken[self._kind(record["plan"])] = made.seconds / new
        return {
            "output": str(made.output),
            "sidecar": str(made.sidecar),
            "frames": made.frames,
            "windows": made.windows,
            "resumed_windows": made.resumed_windows,
            "seconds": made.seconds,
            "fps": record["plan"]["fps"],
        }

    def _event(self, event: Any) -> None:
        if event.kind in ("request_started", "step", "window_finished", "message"):
            self._reply(event.kind, **event.as_dict())


def _request(values: Mapping[str, Any]) -> Any:
    """The request of an order: picture and samples lie in NumPy's files."""
    import numpy as np

    from omniavatar import AvatarRequest, SamplingParams, Waveform

    audio = None
    if values["audio"] is not None:
        audio = Waveform(np.load(values["audio"], allow_pickle=False), values["rate"])
    return AvatarRequest(
        values["prompt"],
        np.load(values["image"], allow_pickle=False),
        audio,
        SamplingParams(**values["sampling"]),
        None if values["size"] is None else tuple(values["size"]),
        values["continues"],
    )


def read_orders(lines: Any, orders: queue.Queue[Any], worker: Worker) -> None:
    """Queue orders; a stop acts at once. When the input ends, the process ends, busy or not."""
    for line in lines:
        order = json.loads(line)
        if order["do"] == "stop":
            worker.stop.set()
        else:
            worker.stop.clear()
            worker.busy.set()
            orders.put(order)
    leave(orders, worker)


def leave(orders: queue.Queue[Any], worker: Worker) -> None:
    """Stop the run in hand, then end the process."""
    worker.stop.set()
    orders.put(None)
    deadline = time.monotonic() + LEAVE_S
    while worker.busy.is_set() and time.monotonic() < deadline:
        time.sleep(0.05)
    os._exit(0)


def watch_parent(parent: int, orders: queue.Queue[Any], worker: Worker) -> None:
    """End with the parent also where another process has inherited the other end of the pipe."""
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    leave(orders, worker)


def check_package() -> str | None:
    """What is wrong with this Python's omniavatar; None if it can be used."""
    install = f"run `{sys.executable} -m pip install --upgrade omniavatar`, or name another Python"
    try:
        import omniavatar
    except ModuleNotFoundError as error:
        return f"the package {error.name} is missing for {sys.executable}; {install}"
    missing = [name for name in NAMES if name not in omniavatar.__all__]
    if missing:
        return (
            f"omniavatar {omniavatar.__version__} of {sys.executable} lacks {', '.join(missing)}; {install}"
        )
    return None


def main() -> int:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for ComfyUI, whose end ends this process
    wire = Wire(replies)
    worker, orders = Worker(wire), queue.Queue[Any]()
    if (problem := check_package()) is not None:
        wire.send("refused", text=problem)
        return 1
    wire.send("ready", pid=os.getpid())
    threading.Thread(target=read_orders, args=(sys.stdin, orders, worker), daemon=True).start()
    if os.name == "posix":
        threading.Thread(target=watch_parent, args=(os.getppid(), orders, worker), daemon=True).start()
    while (order := orders.get()) is not None:
        try:
            worker.carry_out(order)
        except Exception as error:
            traceback.print_exc()
            wire.send("bug", number=order["number"], text=f"{type(error).__name__}: {error}")
            return BUG
        finally:
            worker.busy.clear()
    worker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
