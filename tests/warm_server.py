"""The process behind `warm_start`: loads modules once, then forks for each request.

`python warm_server.py FOLDER OWNER MODULE...` listens on FOLDER/socket and ends with the process OWNER. A
request is one message: a JSON object, and the descriptors of the standard streams and of `pass_fds`. The
answers are the process id, then the exit code.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import io
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import types
from contextlib import suppress
from pathlib import Path
from typing import Any

READ_AT_START = {"LANG", "LC_ALL", "LD_LIBRARY_PATH", "LD_PRELOAD", "OMP_NUM_THREADS", "MKL_NUM_THREADS"}
READ_AT_START |= {"HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TORCH_LOGS", "TRITON_INTERPRET"}
"""Variables that Python or a library reads only once. So are all that begin with PYTHON, but PYTHONPATH."""
MOST_BYTES, MOST_PASSED = 1 << 20, 250
FROM_HERE = selectors.EVENT_READ


def main(folder: Path, owner: int, modules: list[str]) -> None:
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    libraries = [entry for entry in sys.path[1:] if entry not in own]
    for name in modules:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: a fork has only one of them"
    gc.collect()
    gc.freeze()  # or each collection of a child copies all of it
    given = serve(folder, owner)
    if given is not None:
        request, passed = given
        become(request, passed, libraries)
        run(request["arguments"])


def serve(folder: Path, owner: int) -> tuple[dict[str, Any], list[int]] | None:
    """In a forked process, the request and its descriptors; None when the owner has ended."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    selector, life = selectors.DefaultSelector(), os.pidfd_open(owner)
    selector.register(listener, FROM_HERE)
    selector.register(life, FROM_HERE)
    clients: dict[int, socket.socket] = {}  # of each process that runs
    ends: dict[int, int] = {}
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                client, _ = listener.accept()
                message, passed, _, _ = socket.recv_fds(client, MOST_BYTES, MOST_PASSED)
                if not message:  # it was killed meanwhile
                    client.close()
                    continue
                request = json.loads(message)
                problem = refusal(request)
                pid = 0 if problem else os.fork()
                if pid == 0 and not problem:
                    for each in (listener, selector, client, *clients.values()):
                        each.close()
                    for descriptor in (life, *ends):
                        os.close(descriptor)
                    return request, passed
                for descriptor in passed:
                    os.close(descriptor)
                client.send(json.dumps(problem or pid).encode())
                if problem:
                    client.close()
                    continue
                end = os.pidfd_open(pid)
                clients[pid], ends[end] = client, pid
                selector.register(end, FROM_HERE)
                selector.register(client, FROM_HERE, pid)
            elif key.fd == life:
                for pid in clients:
                    os.kill(pid, signal.SIGKILL)
                shutil.rmtree(folder)
                return None
            elif key.fd in ends:
                pid = ends.pop(key.fd)
                selector.unregister(key.fd)
                os.close(key.fd)
                client = clients.pop(pid)
                with suppress(KeyError):  # it left before
                    selector.unregister(client)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with suppress(OSError):
                    client.send(json.dumps(code).encode())
                client.close()
            elif key.data in clients:  # the client is gone, and nobody can end its process now
                selector.unregister(key.fileobj)
                os.kill(key.data, signal.SIGKILL)


def refusal(request: dict[str, Any]) -> str | None:
    """Why a forked process would not be like a new one."""
    first, variables = request["arguments"][0], request["environment"]
    if first.startswith("-") and first not in ("-m", "-c"):
        return f"{first}: is an option of a new interpreter; use subprocess"
    for name in sorted({*variables, *os.environ}):
        once = name in READ_AT_START or (name.startswith("PYTHON") and name != "PYTHONPATH")
        if once and variables.get(name) != os.environ.get(name):
            return f"{name}: is read only when a process starts; use subprocess"
    return None


def become(request: dict[str, Any], passed: list[int], libraries: list[str]) -> None:
    """Descriptors, folder, environment and module path of the request."""
    apart = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 500) for descriptor in passed]
    for descriptor in passed:
        os.close(descriptor)
    for number, descriptor in zip((0, 1, 2, *request["pass_fds"]), apart, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if request["new_session"]:
        os.setsid()
    if request["group"] is not None:
        os.setpgid(0, request["group"])
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name, mode in ((0, "stdin", "rb"), (1, "stdout", "wb"), (2, "stderr", "wb")):
        stream = standard_stream(number, mode, like=getattr(sys, name))
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    added = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = ["", *added, *(entry for entry in libraries if entry not in added)]
    sys.orig_argv = [sys.executable, *request["arguments"]]
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # the module `random` does so by itself


def standard_stream(number: int, mode: str, like: io.TextIOWrapper) -> io.TextIOWrapper:
    """What Python makes of a descriptor when it starts; `like` has what the environment decides."""
    buffered = not isinstance(like.buffer, io.FileIO)  # PYTHONUNBUFFERED
    buffer: Any = open(number, mode, buffering=-1 if buffered else 0, closefd=False)  # noqa: SIM115
    return io.TextIOWrapper(
        buffer,
        encoding=like.encoding,
        errors=like.errors,
        newline="\n",
        line_buffering=like.line_buffering or (buffered and buffer.isatty()),
        write_through=like.write_through,
    )


def run(arguments: list[str]) -> None:
    """Run a module, code or script as the interpreter does; its end is that of the process."""
    kind, *rest = arguments
    if kind == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, module = ["-c", *rest[1:]], types.ModuleType("__main__")
        sys.modules["__main__"] = module
        exec(compile(rest[0], "<string>", "exec"), vars(module))
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.realpath(kind))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
