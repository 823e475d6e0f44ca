"""docs/python_api.md from the docstrings and signatures of the public names."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from typing import Any

from pydantic import BaseModel

import omniavatar

HEAD = """\
# Python API

<!-- Made by `python -m docs.generate` from the docstrings of the public names. Do not edit this page. -->

This page lists the names that `omniavatar` exports. Other modules are internal and can change.

```python
from omniavatar import AvatarPipeline, AvatarRequest, SamplingParams

pipe = AvatarPipeline.from_config("configs/inference_1.3B_optimized.yaml")
request = AvatarRequest(
    prompt="A woman speaks", image="face.jpg", audio="speech.mp3", sampling=SamplingParams(seed=1)
)
pipe.generate(request, "out.mp4")  # a file; the models stay loaded for the next request
for chunk in pipe.stream(request):  # or frames, window by window
    show(chunk.frames, chunk.times)  # (N, H, W, 3) uint8, seconds
```

As with diffusers, a folder of weights is enough, a callback sees every step, and a bar shows them. A
[notebook](../examples/talking_head.ipynb) shows it with the packaged model.

```python
from omniavatar import AvatarPipeline, frames_to_video

pipe = AvatarPipeline.from_pretrained("pretrained_models", {"num_steps": 15}, scale="1.3B")
pipe.set_progress_bar_config(desc="face")  # tqdm's options; without this call no bar is shown


def each_step(pipe, step, timestep, kwargs):  # kwargs: latents (a copy), window, windows
    pipe.interrupt = kwargs["window"] == 2  # ends the run before the next step; finished windows are kept
    return kwargs


pipe.generate(request, "out.mp4", callback_on_step_end=each_step)
frames_to_video((chunk.frames for chunk in pipe.stream(request)), "silent.mp4", fps=25)
```

- **A callback changes no byte of the video.** It is called when the host has queued the step. Without one
  nothing is added to a step. One that reads `latents` waits for the GPU, which then has no work queued ahead;
  with `()` as `callback_on_step_end_tensor_inputs` they are not even copied.

A service keeps one pipeline, takes bytes, follows the progress, and can stop a run:

```python
from threading import Event

from omniavatar import AvatarPipeline, AvatarRequest, StoppedError

stop = Event()  # another thread calls stop.set()
with AvatarPipeline.from_config("config.yaml", on_event=show_progress) as pipe:  # frees the models at the end
    pipe.warm_up()  # load everything before the first request
    request = AvatarRequest("A woman speaks", picture_bytes, sound_bytes)
    try:
        pipe.generate(request, "out.mp4", should_stop=stop.is_set)
    except StoppedError:
        pass  # finished windows are kept; the same call continues after them
```

- **The package is quick to import.** A name is loaded when it is first used, so `import omniavatar` does not
  load torch.
- **A result depends on its inputs, its seed and the configuration.** It does not depend on earlier requests.
- **Errors a user can fix** are subclasses of `OmniAvatarError`; see [exit codes](exit_codes.md). Other
  exceptions are faults of this package.
- **A listener** (`on_event`) gets every event, in the thread in which it happens; that thread waits for it.
  If it raises, the run ends, the caller gets the exception, and finished windows are kept.
- **Messages** go to the logger `omniavatar`, unless the pipeline has its own recorder. `log_event` is the
  listener that does this.
- **One pipeline runs one request at a time.** Use it in one thread, or under a lock.
- **Settings** are described on their [own page](settings.md). Runnable programs lie in
  [examples](../examples/README.md).
"""

ORDER = (
    "AvatarPipeline",
    "generate",
    "AvatarRequest",
    "SamplingParams",
    "Waveform",
    "VideoChunk",
    "RunResult",
    "frames_to_video",
    "video_to_frames",
)
"""Names in the order a reader needs them; the others follow in the order of `__all__`."""


def page() -> str:
    """The whole page."""
    public = [name for name in omniavatar.__all__ if name != "__version__"]
    names = [*ORDER, *(name for name in public if name not in ORDER)]
    version = "## `__version__`\n\nThe version of the package, as text.\n"
    return "\n".join([HEAD, *(_entry(name, getattr(omniavatar, name)) for name in names), version])


def _entry(name: str, value: Any) -> str:
    lines = [f"## `{name}`", ""]
    if inspect.isfunction(value):
        return "\n".join([*lines, *_call(name, value), *prose(value)])
    if issubclass(value, BaseModel):
        return "\n".join([*lines, *prose(value), *_sections(value)])
    lines += prose(value)
    if dataclasses.is_dataclass(value):
        lines += ["| field | type | default |", "|---|---|---|"]
        lines += [_field(field) for field in dataclasses.fields(value)] + [""]
    elif issubclass(value, Exception):
        kinds = [kind for kind in value.__subclasses__() if kind.__module__ == value.__module__]
        lines += [f"- `{kind.__name__}`, exit code {kind.exit_code}" for kind in kinds] + [""]
    for member, found in vars(value).items():
        if member.startswith("_"):
            continue
        if isinstance(found, property):
            lines += [f"### `{name}.{member}`", "", *prose(found)]
        elif isinstance(found, classmethod) or inspect.isfunction(found):
            function = found.__func__ if isinstance(found, classmethod) else found
            lines += [f"### `{name}.{member}`", "", *_call(member, function), *prose(function)]
    return "\n".join(lines)


def _call(name: str, function: Any) -> list[str]:
    """The signature as its source spells it."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body
    assert isinstance(node, ast.FunctionDef) and node.returns is not None
    arguments = node.args
    if arguments.vararg or arguments.posonlyargs:
        raise ValueError(f"{name}: this generator does not know such a signature")
    missing: list[ast.expr | None] = [None] * (len(arguments.args) - len(arguments.defaults))
    pairs = list(zip(arguments.args, [*missing, *arguments.defaults], strict=True))
    shown = [_argument(entry, default) for entry, default in pairs if entry.arg not in ("self", "cls")]
    if arguments.kwonlyargs:
        rest = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        shown += ["*", *(_argument(entry, default) for entry, default in rest)]
    if arguments.kwarg:
        shown.append("**" + _argument(arguments.kwarg, None))
    result = ast.unparse(node.returns)
    line = f"{name}({', '.join(shown)}) -> {result}"
    if len(line) > 100:
        line = "\n".join([f"{name}(", *(f"    {entry}," for entry in shown), f") -> {result}"])
    return ["```python", line, "```", ""]


def _argument(entry: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(entry.annotation)}" if entry.annotation else ""
    return f"{entry.arg}{kind}" + (f" = {ast.unparse(default)}" if default else "")


def _field(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        default = f"`{field.default}`"
    elif field.default_factory is not dataclasses.MISSING:
        default = f"`{getattr(field.default_factory, '__name__', 'made for each object')}()`"
    else:
        default = "required"
    kind = str(field.type).replace("|", "\\|")
    return f"| `{field.name}` | `{kind}` | {default} |"


def _sections(model: type[BaseModel]) -> list[str]:
    rows = ["| section | meaning |", "|---|---|"]
    for name, field in model.model_fields.items():
        rows.append(f"| [`{name}`](settings.md#{name}) | {field.description} |")
    return [*rows, ""]


def prose(value: Any) -> list[str]:
    """A docstring as Markdown: indented blocks become code, `name: text` becomes a list entry."""
    text = inspect.getdoc(value)
    if not text:
        raise ValueError(f"{value} is public and has no docstring")
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        rows = block.splitlines()
        if all(row.startswith("    ") for row in rows):
            lines += ["```", *(row[4:] for row in rows), "```", ""]
        else:
            lines += [*(_row(row) for row in rows), ""]
    return lines


def _row(row: str) -> str:
    entry = re.match(r"\s*([a-z_]+(?:, [a-z_]+)*): (.*)", row)
    return f"- `{entry[1]}`: {entry[2]}" if entry else row
