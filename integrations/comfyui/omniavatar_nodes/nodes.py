"""The nodes: Load, Generate, Continue, Plan, Frames (ComfyUI's V3 schema)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import ComfyExtension, io

from . import inputs, run, video
from .engine import EngineError, Engines, choose_python
from .inputs import InputProblem, Model, Request

CATEGORY = "OmniAvatar"
ENGINES = Engines()
"""The engine's process outlives queue items; the only state of the nodes beside `MADE`."""
MADE: dict[str, Path] = {}
"""The last video of each node, by the node's id."""
PROMPT = "A person is talking to the camera, smiling"
ADVANCED = {"advanced": True}
ModelType = io.Custom("OMNIAVATAR_MODEL")


class OmniAvatarLoad(io.ComfyNode):
    """Chooses weights, settings and the Python of the engine."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OmniAvatarLoad",
            display_name="OmniAvatar Load",
            category=CATEGORY,
            description="Chooses the model. It is loaded by the first video and stays loaded, in a separate "
            "process.",
            inputs=[
                io.String.Input(
                    "weights",
                    default="pocket",
                    tooltip="pocket (small, rendered heads only), a folder that `omniavatar download` wrote, "
                    "or a YAML file. Relative paths lie in models/omniavatar.",
                ),
                io.String.Input(
                    "settings",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="One name=value a line, such as num_steps=15. omniavatar's page of settings "
                    "lists all.",
                ),
                io.String.Input(
                    "scale",
                    default="",
                    optional=True,
                    tooltip="14B, 1.3B, livetalk: which model, if the folder holds several.",
                    extra_dict=ADVANCED,
                ),
                io.String.Input(
                    "python",
                    default="",
                    optional=True,
                    tooltip="Python of the environment that has omniavatar. Empty: $OMNIAVATAR_PYTHON, else "
                    "ComfyUI's own.",
                    extra_dict=ADVANCED,
                ),
                io.Boolean.Input(
                    "keep_loaded",
                    default=True,
                    optional=True,
                    tooltip="Off: the model leaves memory after each video.",
                    extra_dict=ADVANCED,
                ),
                io.Boolean.Input(
                    "free_memory",
                    default=True,
                    optional=True,
                    tooltip="Unload ComfyUI's own models before a video, so that this model has the GPU.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[ModelType.Output("model")],
        )

    @classmethod
    def validate_inputs(cls, weights: str = "pocket", python: str = "") -> bool | str:
        try:
            inputs.resolved_weights(weights, folder_paths.models_dir)
            choose_python(python)
        except (InputProblem, EngineError) as problem:
            return str(problem)
        return True

    @classmethod
    def fingerprint_inputs(cls, weights: str = "pocket", **others: Any) -> str:
        resolved = inputs.resolved_weights(weights, folder_paths.models_dir)
        return resolved if resolved == "pocket" else inputs.weights_state(resolved)

    @classmethod
    def execute(
        cls,
        weights: str,
        settings: str = "",
        scale: str = "",
        python: str = "",
        keep_loaded: bool = True,
        free_memory: bool = True,
    ) -> io.NodeOutput:
        resolved = inputs.resolved_weights(weights, folder_paths.models_dir)
        model = Model(resolved, scale.strip(), settings, choose_python(python), keep_loaded, free_memory)
        run.ask(ENGINES, model)
        return io.NodeOutput(model)


def request_inputs() -> list[io.Input]:
    """The inputs that Generate, Continue and Plan share."""
    return [
        ModelType.Input("model"),
        io.Image.Input("image", tooltip="The portrait; one picture."),
        io.Audio.Input("audio", optional=True, tooltip="The voice; it decides the length."),
        io.String.Input("prompt", multiline=True, default=PROMPT),
        io.Int.Input(
            "seed",
            default=42,
            min=0,
            max=2**63 - 1,
            extra_dict={"control_after_generate": "fixed"},
            tooltip="The same seed and inputs give the same video, at once if it is finished.",
        ),
        io.Int.Input("steps", default=0, min=0, max=1000, optional=True, tooltip="0: as configured."),
        io.Float.Input(
            "guidance", default=-1.0, min=-1.0, max=100.0, step=0.1, optional=True,
            tooltip="How closely the prompt is followed; -1: as configured.", extra_dict=ADVANCED,
        ),
        io.Float.Input(
            "audio_guidance", default=-1.0, min=-1.0, max=100.0, step=0.1, optional=True,
            tooltip="How closely the voice is followed; -1: as configured.", extra_dict=ADVANCED,
        ),
        io.String.Input(
            "size", default="auto", optional=True,
            tooltip="WIDTHxHEIGHT, one of the configured sizes; auto: the one nearest to the portrait.",
            extra_dict=ADVANCED,
        ),
    ]  # fmt: skip


NAME = io.String.Input(
    "name",
    default="omniavatar",
    optional=True,
    tooltip="Folder below ComfyUI's output folder.",
    extra_dict=ADVANCED,
)
MADE_OUTPUTS = [io.Video.Output("video"), io.String.Output("path", display_name="path")]


def request_of(
    image: Any,
    prompt: str,
    seed: int,
    audio: Any = None,
    steps: int = 0,
    guidance: float = inputs.CONFIGURED,
    audio_guidance: float = inputs.CONFIGURED,
    size: str = "auto",
) -> Request:
    """The request of a node's inputs. Raises InputProblem."""
    samples, rate = inputs.sound(audio)
    chosen = inputs.sampling(seed, steps, guidance, audio_guidance)
    return Request(prompt, inputs.picture(image), samples, rate, chosen, inputs.size(size))


class _Makes(io.ComfyNode):
    """What Generate and Continue share: the finished file as VIDEO, shown in the node."""

    @classmethod
    def fingerprint_inputs(cls, **values: Any) -> str:
        """Another value once the video of this node was deleted, so that it is made again."""
        made = MADE.get(cls._id())
        return "" if made is None or made.is_file() else f"{made} is gone"

    @classmethod
    def _id(cls) -> str:
        return "" if cls.hidden is None else str(cls.hidden.unique_id)

    @classmethod
    def _made(cls, model: Model, request: Request, name: str) -> io.NodeOutput:
        path = Path(run.make(ENGINES, model, request, name)["output"])
        MADE[cls._id()] = path
        below = path.parent.relative_to(folder_paths.get_output_directory()).as_posix()
        shown = {"filename": path.name, "subfolder": below, "type": "output"}
        return io.NodeOutput(
            video.FinishedVideo(path), str(path), ui={"images": [shown], "animated": (True,)}
        )


class OmniAvatarGenerate(_Makes):
    """Makes a video; an interrupted one goes on, a finished one is given at once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OmniAvatarGenerate",
            display_name="OmniAvatar Generate",
            category=CATEGORY,
            description="A portrait and a voice become a talking video. Interrupt it at any time: finished "
            "windows are kept, and the same inputs go on after them.",
            inputs=[*request_inputs(), NAME],
            outputs=MADE_OUTPUTS,
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Model, name: str = "omniavatar", **values: Any) -> io.NodeOutput:
        return cls._made(model, request_of(**values), name)


class OmniAvatarContinue(_Makes):
    """Makes a finished video longer, with another sound."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        audio = io.Audio.Input("audio", tooltip="What is said next.")
        shared = [audio if each.id == "audio" else each for each in request_inputs() if each.id != "size"]
        return io.Schema(
            node_id="OmniAvatarContinue",
            display_name="OmniAvatar Continue",
            category=CATEGORY,
            description="The new video begins with the finished one and goes on with more sound.",
            inputs=[io.Video.Input("video", tooltip="A video of OmniAvatar Generate."), *shared, NAME],
            outputs=MADE_OUTPUTS,
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Model, video: Any, name: str = "omniavatar", **values: Any) -> io.NodeOutput:
        return cls._made(model, replace(request_of(**values), continues=_path_of(video)), name)


class OmniAvatarPlan(io.ComfyNode):
    """Says what a video will be before it is made."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OmniAvatarPlan",
            display_name="OmniAvatar Plan",
            category=CATEGORY,
            description="Length, windows, memory and, after a first video of this kind, the time. No weights "
            "are loaded.",
            inputs=request_inputs(),
            outputs=[
                io.String.Output("text", display_name="text"),
                io.Int.Output("frames", display_name="frames"),
                io.Float.Output("seconds", display_name="seconds"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Model, **values: Any) -> io.NodeOutput:
        plan = run.ask(ENGINES, model, request_of(**values))
        text = plan_text(plan)
        return io.NodeOutput(text, plan["frames"], plan["duration_s"], ui={"text": (text,)})


def plan_text(plan: dict[str, Any]) -> str:
    """The plan in words."""
    height, width = plan["size"]
    taken = plan["seconds"]
    lines = [
        f"{plan['duration_s']:.2f} s of video: {plan['frames']} frames of {width}x{height}",
        f"{plan['windows']} windows of {plan['steps']} steps",
        f"GPU memory: up to {plan['device_peak'] / 1e9:.1f} GB; {plan['placement']}",
        "time: known after the first video of this size and these steps"
        if taken is None
        else f"time: about {taken:.0f} s, by the last video of this size and these steps",
    ]
    return "\n".join([*lines, *plan["notes"]])


class OmniAvatarFrames(io.ComfyNode):
    """A range of a video's frames as IMAGE; the others are never in memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OmniAvatarFrames",
            display_name="OmniAvatar Frames",
            category=CATEGORY,
            description="Some frames of a video as IMAGE. A minute of video as IMAGE takes several GB.",
            inputs=[
                io.Video.Input("video"),
                io.Int.Input("start", default=0, min=0, max=2**31 - 1, tooltip="Number of the first frame."),
                io.Int.Input("count", default=16, min=1, max=2**31 - 1, tooltip="Fewer at the end."),
                io.Int.Input(
                    "most_megabytes", default=1000, min=1, max=2**31 - 1, optional=True,
                    tooltip="More than this is refused.", extra_dict=ADVANCED,
                ),
            ],
            outputs=[io.Image.Output("images")],
        )  # fmt: skip

    @classmethod
    def execute(cls, video: Any, start: int, count: int, most_megabytes: int = 1000) -> io.NodeOutput:
        return io.NodeOutput(_frames(_path_of(video), start, count, most_megabytes))


_path_of, _frames = video.path_of, video.frames  # `video` is also the name of an input


class OmniAvatarExtension(ComfyExtension):
    """The nodes of this package."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [OmniAvatarLoad, OmniAvatarGenerate, OmniAvatarContinue, OmniAvatarPlan, OmniAvatarFrames]


async def comfy_entrypoint() -> OmniAvatarExtension:
    """Called by ComfyUI when it loads the package."""
    return OmniAvatarExtension()
