"""`omniavatar web`: the server on this machine only, with its worker, and a page in the browser."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from omniavatar.cli.choose import CONFIGS, POCKET, best_config
from omniavatar.cli.common import HpOption, print_warning, require_one_process, user_errors
from omniavatar.text import one_line

if TYPE_CHECKING:
    from fastapi import FastAPI

    from omniavatar.config.schema import PipelineConfig
    from omniavatar.engine.pipeline import AvatarPipeline
    from omniavatar.live.session import LiveSession
    from omniavatar.serve.api.models import Catalogue
    from omniavatar.serve.jobs.keys import KeyStore
    from omniavatar.serve.jobs.workers import Workers
    from omniavatar.serve.page.routes import WorkerState
    from omniavatar.serve.page.times import Times
    from omniavatar.serve.settings import ServeSettings

PORT = 7860
READY_S = 120.0
LEASE_S = 15.0
"""After a crash, a job goes on so long after the worker was heard last, if no lock says that it is dead."""
MEASURE_S = 600.0
KEPT_S = 10 * 365 * 86400.0
"""A person deletes the videos of a gallery, not a server."""
LARGEST_MEASURED = 2e9
"""Bytes of weights up to which a model is timed before its first video."""
ENDED = "the page has ended; videos go on after their last finished window when it starts again"


def web(
    config: Annotated[
        list[Path] | None,
        typer.Option(
            "--config",
            "-c",
            metavar="YAML",
            help="Model to offer beside the packaged one, such as configs/inference_1.3B.yaml. May be "
            "repeated. Default: the best model whose weights are here.",
        ),
    ] = None,
    hp: HpOption = None,
    demo: Annotated[
        bool,
        typer.Option("--demo", help="Begin with the packaged model, portrait and voice."),
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0: a free one.")] = PORT,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Print the address and open no browser.")
    ] = False,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the videos and their queue.")] = None,
    price_per_hour: Annotated[
        float,
        typer.Option(min=0, help="What an hour of this machine costs, shown for each video."),
    ] = 0.0,
) -> None:
    """Make videos on a page in the browser, on this machine only.

    The page needs neither a GPU nor a download. Videos, settings and the queue stay in the folder
    --data-dir, and unfinished videos go on when the page starts again.
    """
    from omniavatar.serve.api.reader_processes import begin_readers

    with user_errors(on_interrupt=ENDED):
        require_one_process()
        begin_readers()
        settings = page_settings(port, data_dir)
        models = models_of(settings, config or [], demo, hp or ())
        run(settings, models, demo, price_per_hour, open_browser=not no_browser)


def run(
    settings: ServeSettings, models: Catalogue, demo: bool, price_per_hour: float, open_browser: bool
) -> None:
    """Serve until Ctrl-C. Raises OmniAvatarError."""
    from omniavatar.cli.serve import run_server
    from omniavatar.live.limits import ServerLimits
    from omniavatar.live.server import websocket_settings
    from omniavatar.serve.page.inputs import CheckedApart
    from omniavatar.serve.page.routes import PageParts, add_page
    from omniavatar.serve.page.session import PARAMETER, page_key
    from omniavatar.serve.page.times import Times
    from omniavatar.serve.page.voices import PiperVoice

    listening = _listen(settings.port)
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    over = threading.Event()
    measuring: list[threading.Thread] = []
    check = CheckedApart()

    def dress(app: FastAPI, keys: KeyStore, workers: Workers | None) -> None:
        service = app.state.service
        times = Times(service.store, models)
        key = page_key(keys, settings.data_dir)
        talk, no_talk = _talk(settings, models, key)
        add_page(
            app,
            PageParts(
                times=times,
                example=demo,
                check=check,
                voice=PiperVoice.find(),
                talk=talk,
                no_talk=no_talk,
                key=key,
                price_per_hour=price_per_hour,
                worker=lambda: _worker_state(workers),
            ),
        )
        opened = address if key is None else f"{address}?{PARAMETER}={key}"
        threading.Thread(target=_announce, args=(address, opened, open_browser, over), daemon=True).start()
        measuring.append(threading.Thread(target=_measure, args=(settings, models, times, over), daemon=True))
        measuring[0].start()

    with listening:
        try:
            with suppress(KeyboardInterrupt):  # the ordinary end, which run_server has tidied up for
                run_server(
                    settings,
                    models=models,
                    listening=listening,
                    dress=dress,
                    lease=LEASE_S,
                    websockets=websocket_settings(ServerLimits()),
                )
            print(ENDED, file=sys.stderr)
        finally:
            over.set()
            check.close()
            for thread in measuring:
                thread.join(5.0)


def _worker_state(workers: Workers | None) -> WorkerState:
    from omniavatar.serve.page.routes import WorkerState

    assert workers is not None
    status = workers.status()
    return WorkerState(ready=status.ready > 0, problem="; ".join(status.errors))


def page_settings(port: int, data_dir: Path | None) -> ServeSettings:
    """The server's settings with the page's own defaults. Raises ConfigError, ResourceError."""
    from omniavatar.errors import ConfigError, ResourceError

    try:
        import omniavatar.serve.api.app  # noqa: F401
        from omniavatar.serve.settings import load_settings
    except ImportError as error:
        raise ResourceError(
            f"web: the package {error.name} is missing; pip install 'omniavatar[web]'"
        ) from None
    loaded = load_settings(None, {"port": port, "data_dir": data_dir})
    settings, origins = loaded.settings, loaded.origins
    if not settings.is_loopback:
        raise ConfigError(
            f"{origins['host']}: web is for this machine only; unset it, or use `omniavatar serve`"
        )
    import torch

    own: dict[str, Any] = {
        "host": "127.0.0.1",
        "keep_seconds": KEPT_S,
        "log_level": "warning",
        "drain_seconds": 0.0,
        "gpus": "all" if torch.cuda.is_available() else "cpu",
        "data_dir": Path("omniavatar_web"),
    }
    chosen = {name: value for name, value in own.items() if origins[name] == "default"}
    return settings.model_copy(update=chosen)


def models_of(
    settings: ServeSettings, configs: list[Path], demo: bool, overrides: Sequence[str] = ()
) -> Catalogue:
    """The models by name, the default first; `overrides` are for that one.

    Raises ConfigError, CheckpointError.
    """
    import torch

    from omniavatar.config.change import changed
    from omniavatar.config.load import load_config
    from omniavatar.errors import CheckpointError
    from omniavatar.plan.preview import missing_files
    from omniavatar.serve.api.models import Catalogue

    if not configs and not demo:
        best = best_config(CONFIGS).config
        configs = [] if best == POCKET else [best]
    paths = [POCKET, *configs] if demo else [*configs, POCKET]
    found: dict[str, PipelineConfig] = {}
    for path in paths:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:64] or "model"
        loaded = load_config(path, overrides if not found else ())
        loaded.config.model.check_files_named()
        for missing in missing_files(loaded.config.model):
            raise CheckpointError(
                f"{missing}: weight file of {path} not found; `omniavatar download` fetches models, else "
                "correct the path"
            )
        for warning in loaded.warnings:
            print_warning(warning)
        config = loaded.config
        if config.runtime.threads is None and settings.gpus == "cpu":
            config = changed(config, runtime={"threads": torch.get_num_threads()})
        found.setdefault(name, config)
    return Catalogue(found, settings.most_steps)


def _listen(port: int) -> socket.socket:
    """A socket on the loopback. Raises ResourceError if the port is taken."""
    from omniavatar.errors import ResourceError

    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
    except OSError as error:
        listening.close()
        raise ResourceError(
            f"--port {port}: cannot be used ({error.strerror}); the page may be open there already, "
            "else choose another port"
        ) from None
    return listening


def _announce(address: str, opened: str, open_browser: bool, over: threading.Event) -> None:
    """Wait until the server answers, then print its address and open it."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    ends = time.monotonic() + READY_S
    while not over.wait(0.1) and time.monotonic() < ends:
        try:
            with direct.open(f"{address}health", timeout=5):
                break
        except (urllib.error.URLError, OSError):
            continue
    if over.is_set():
        return
    print(f"the page is at {opened} (Ctrl-C ends it)", flush=True)
    if open_browser and (sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)):
        import webbrowser

        webbrowser.open(opened)


def _measure(settings: ServeSettings, models: Catalogue, times: Times, over: threading.Event) -> None:
    """Time the models that are small enough, each once on this machine, in a process beside the worker."""
    from omniavatar.config.change import changed
    from omniavatar.device import choose_device
    from omniavatar.errors import OmniAvatarError
    from omniavatar.measure.times import PartTimes, times_name
    from omniavatar.media.atomic import atomic_path

    device = choose_device("cpu" if settings.gpus == "cpu" else "auto")
    for name, config in models.configs.items():
        files = [path for path in config.model.dit_path if path.is_file()]
        if not files or sum(path.stat().st_size for path in files) > LARGEST_MEASURED:
            continue
        run_as = changed(config, runtime={"device": str(device)})
        path = settings.data_dir / times_name(run_as)
        try:
            times.finish(name, PartTimes.parse(path.read_text("utf-8")).seconds)
            continue
        except (OSError, ValueError, KeyError, TypeError):  # the first time, or damaged
            times.begin(name)
        try:
            text = _timed(run_as, over)
            times.finish(name, PartTimes.parse(text).seconds)
            with atomic_path(path) as temporary:
                temporary.write_text(text, "utf-8")
        except (OmniAvatarError, ValueError, KeyError, TypeError) as error:
            times.finish(name, None)
            if not over.is_set():
                print_warning(f"{name}: the time of a video is not known before the first one ({error})")


def _timed(config: PipelineConfig, over: threading.Event) -> str:
    """What the measuring process prints. Raises ResourceError."""
    import pickle

    from omniavatar.errors import ResourceError

    command = [sys.executable, "-m", "omniavatar.measure.times"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, env=environment, **pipes) as process:
        stopper = threading.Thread(target=_kill_when_over, args=(process, over), daemon=True)
        stopper.start()
        output, problem = process.communicate(pickle.dumps(config))
    if process.returncode != 0:
        lines = problem.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
        raise ResourceError(one_line(lines[-1]))
    return str(output.decode("utf-8"))


def _kill_when_over(process: subprocess.Popen[bytes], over: threading.Event) -> None:
    ends = time.monotonic() + MEASURE_S
    while process.poll() is None:
        if over.wait(0.2) or time.monotonic() > ends:
            process.kill()
            return


def _talk(settings: ServeSettings, models: Catalogue, key: str | None) -> tuple[PageTalk | None, str]:
    """Live sessions in this process, or why there are none and what to do."""
    try:
        import aiortc  # noqa: F401
        import websockets  # noqa: F401
    except ImportError as error:
        return None, f"the package {error.name} is missing; pip install 'omniavatar[live]' and start again"
    config = live_form(next(iter(models.configs.values())))
    return PageTalk(config, settings.data_dir / "talk-portrait", key), ""


def live_form(config: PipelineConfig) -> PipelineConfig:
    """The packaged student with the same `runtime` for the packaged model; another model itself."""
    from omniavatar.config.load import load_config

    if config.model != load_config("pocket").config.model:
        return config
    return load_config("pocket-live").config.model_copy(update={"runtime": config.runtime})


class PageTalk:
    """A live server for the page: one portrait at a time, and a pipeline that is opened when it is needed."""

    def __init__(self, config: PipelineConfig, portrait: Path, key: str | None) -> None:
        from omniavatar.live.limits import Door, ServerLimits
        from omniavatar.live.server import make_app
        from omniavatar.serve.page.words import example_prompt

        self._config, self._portrait, self._prompt = config, portrait, example_prompt(config)
        self._pipeline: AvatarPipeline | None = None
        self.app = make_app(self._make, Door(True, key), ServerLimits(sessions=2))

    def use(self, portrait: Path) -> None:
        from omniavatar.media.atomic import atomic_path

        with atomic_path(self._portrait) as temporary:
            shutil.copyfile(portrait, temporary)

    def _make(self, prompt: str | None) -> LiveSession:
        from omniavatar.assets import pocket
        from omniavatar.engine.pipeline import AvatarPipeline
        from omniavatar.live.session import LiveSession

        if self._pipeline is None:
            self._pipeline = AvatarPipeline.from_config(self._config)
        image = self._portrait if self._portrait.is_file() else pocket.PORTRAIT
        return LiveSession(self._pipeline, image=image, prompt=prompt or self._prompt)
