"""`omniavatar plan`: what a run will do and need. Loads no model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omniavatar.cli.choose import CONFIGS, best_config
from omniavatar.cli.common import (
    MOST_MINUTES,
    ConfigChoice,
    HpOption,
    JsonOption,
    print_warning,
    user_errors,
)
from omniavatar.text import printable

if TYPE_CHECKING:
    import numpy as np
    import torch

    from omniavatar.config.schema import PipelineConfig
    from omniavatar.measure.deadline import Proposal
    from omniavatar.plan.estimate import MemoryEstimate
    from omniavatar.plan.run import RunPlan
    from omniavatar.types import StepPlan


def plan(
    config: ConfigChoice = None,
    audio: Annotated[
        Path | None, typer.Option(help="Voice (any audio file) that decides the length.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.001, max=MOST_MINUTES, help="Length of the audio in minutes, instead of a file."),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="Portrait that decides the shape; without it the first configured size."),
    ] = None,
    deadline: Annotated[
        str | None,
        typer.Option(
            help="With --minutes: time a few forwards on this machine and propose the best-looking settings "
            "that finish within this time, such as 20min."
        ),
    ] = None,
    hp: HpOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the length, shape, work and memory of a run, without running it.

    The voice decides the length of the video, and the portrait decides its shape: the configured size whose
    shape is nearest. Without --audio and --minutes it plans a silent video of seq_len frames. The work is
    shown as windows, tokens, steps computed and skipped, and passes.
    """
    if audio is not None and minutes is not None:
        raise typer.BadParameter("give --audio or --minutes, not both")
    if deadline is not None and minutes is None:
        raise typer.BadParameter("--deadline needs --minutes, the length of the video")
    if config is None:
        with user_errors():
            config, reason = best_config(CONFIGS)
        typer.echo(printable(reason), err=True)
    if deadline is not None and minutes is not None:
        with user_errors():
            _propose(config, hp, minutes, deadline, as_json)
        return
    with user_errors():
        from omniavatar.config.load import load_config
        from omniavatar.plan.estimate import estimate_memory, plan_report
        from omniavatar.plan.preview import with_family

        loaded = load_config(config, hp or ())
        for warning in loaded.warnings:
            print_warning(warning)
        settings = with_family(loaded.config)
        samples = _samples(settings, audio, minutes)
        size = _size(settings, image)
        run_plan = _run_plan(settings, size, samples)
        memory = estimate_memory(settings, run_plan, _device(settings))
        if as_json:
            from omniavatar.cli.terminal import say_json

            say_json(plan_report(run_plan, memory, settings))
        else:
            length, shape = _decided_by(settings, audio, minutes, image)
            attention = settings.sparsity.sparse_attention
            _print(run_plan, memory, _coders(settings), attention, length, shape)


def _decided_by(
    config: PipelineConfig, audio: Path | None, minutes: float | None, image: Path | None
) -> tuple[str, str]:
    """What decides the length and the shape of the video."""
    seconds = config.video.silence_duration_s
    silence = f", after {seconds:g} s of silence" if seconds else ""
    if audio is not None:
        length = f"decided by the voice {audio}{silence}"
    elif minutes is not None:
        length = f"{_minutes(minutes)} of voice{silence}"
    elif config.family.chunk is not None:
        length = "one second of voice, as an example; --audio or --minutes decides the length"
    else:
        length = "seq_len frames, silent; with --audio the voice decides the length"
    if image is not None:
        return length, f"decided by the portrait {image}: the configured size whose shape is nearest"
    return length, "the first configured size; with --image the portrait decides the shape"


def _propose(config: Path, hp: list[str] | None, minutes: float, deadline: str, as_json: bool) -> None:
    """Print the proposal. Raises ResourceError where no settings meet the deadline."""
    from omniavatar.config.load import load_config
    from omniavatar.errors import ResourceError
    from omniavatar.measure.deadline import parse_duration, propose

    seconds = parse_duration(deadline)
    found = propose(load_config(config, hp or ()).config, minutes, seconds, started=time.process_time())
    if as_json:
        from dataclasses import asdict

        from omniavatar.cli.terminal import say_json

        say_json(asdict(found))
    else:
        _print_proposal(found)
    if found.chosen is None:
        fastest = found.others[0]
        settings = f"--hp {fastest.override}" if fastest.settings else "those of the configuration"
        raise ResourceError(
            f"deadline: {_minutes(minutes)} of video cannot be made in {_duration(seconds)} on this machine; "
            f"the fastest settings take {_duration(fastest.seconds)}: {settings}"
        )


def _print_proposal(found: Proposal) -> None:
    from rich.table import Table

    from omniavatar.cli.terminal import SafeConsole

    table = Table("settings (--hp)", "predicted", "forwards", "points lost", pad_edge=False, box=None)
    late = "" if found.chosen is not None and not found.chosen.settings else "too slow: "
    rows = [(f"{late}as configured", found.as_configured)]
    rows += [(f"too slow: {each.override}", each) for each in found.others if each.settings]
    if found.chosen is not None and found.chosen.settings:
        rows.append((f"[bold]chosen: {found.chosen.override}[/]", found.chosen))
    for text, choice in rows:
        table.add_row(text, _duration(choice.seconds), str(choice.forwards), f"{choice.points:.1f}")
    console = SafeConsole()
    console.print(table)
    console.print(
        "predicted: with start and loading; forwards: passes of the model; points lost: an order of "
        "preference, not a measurement",
        soft_wrap=True,
    )
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    if found.chosen is not None:
        console.print(
            f"{_minutes(found.minutes)} of video within {_duration(found.deadline)}: "
            f"{'--hp ' + found.chosen.override if found.chosen.settings else 'the configuration as it is'}, "
            f"predicted {_duration(found.chosen.seconds)}, of which start and loading take "
            f"{found.loading:.0f} s",
            soft_wrap=True,
        )


def _minutes(minutes: float) -> str:
    return "1 minute" if minutes == 1 else f"{minutes:g} minutes"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{minutes:.0f} min {rest:.0f} s" if minutes else f"{rest:.1f} s"


def _device(config: PipelineConfig) -> torch.device:
    """The configured device, or the CPU where this machine does not have it."""
    from omniavatar.device import choose_device
    from omniavatar.errors import ResourceError

    try:
        return choose_device(config.runtime.device)
    except ResourceError:
        return choose_device("cpu")


def _samples(config: PipelineConfig, audio: Path | None, minutes: float | None) -> int | None:
    """Samples of the audio with the leading silence; None for a silent video."""
    video = config.video
    if minutes is not None:
        return round(minutes * 60 * video.sample_rate) + round(video.silence_duration_s * video.sample_rate)
    if audio is None:
        return video.sample_rate if config.family.chunk is not None else None
    from omniavatar.media.audio import measure_audio

    return measure_audio(audio, video.sample_rate, video.silence_duration_s).samples


def _size(config: PipelineConfig, image: Path | None) -> tuple[int, int]:
    if image is None:
        return config.video.sizes[0]
    from omniavatar.encoders.image import choose_bucket
    from omniavatar.media.image import load_image

    height, width = load_image(image).shape[:2]
    return choose_bucket(height, width, config.video.sizes)


def _run_plan(config: PipelineConfig, size: tuple[int, int], samples: int | None) -> RunPlan:
    """The plan, with its sparsity plan unless that needs weights that are not on this disk."""
    from omniavatar.accel.attention.registry import choose_backend
    from omniavatar.accel.attention.sparse_registry import break_even, choose_sparse
    from omniavatar.device import torch_dtype
    from omniavatar.plan.preview import files_exist, find_dit_config
    from omniavatar.plan.run import plan_run
    from omniavatar.plan.sparsity import plan_sparse_run

    wanted, model = config.sparsity, config.model
    measured = wanted.sparse_attention == "calibrated"
    if wanted.sparse_attention == "dense" or (
        measured and model.weights == "files" and not files_exist(model)
    ):
        return plan_run(config, size, samples, _step_plan(config))
    dit, _ = find_dit_config(model)
    device, dtype, attention = _device(config), torch_dtype(model.dtype), config.runtime.attention
    if attention in ("auto", "fastest"):
        attention = choose_backend(device, dtype)
    name, width = wanted.sparse_backend, dit.dim // dit.num_heads
    if name == "auto":  # a named one may be meant for another machine, like `attention`
        name = choose_sparse(name, device, dtype, attention, wanted.sparse_block_size, width).name
    return plan_sparse_run(
        config,
        size,
        samples,
        dit,
        _step_plan(config),
        lambda tokens: break_even(name, attention, dit.num_heads, tokens),
    )


def _step_plan(config: PipelineConfig) -> StepPlan | None:
    """The step cache's plan; None where TeaCache needs weights that are not on this disk."""
    from omniavatar.plan.calibration import find_constants
    from omniavatar.plan.preview import files_exist, find_dit_config, time_projections
    from omniavatar.plan.steps import make_step_plan, sampling_schedule

    model, sampling = config.model, config.sampling
    if sampling.cache_policy == "teacache" and not files_exist(model):
        return None
    dit, _ = find_dit_config(model)

    def projections() -> np.ndarray:
        return time_projections(model, dit, sampling_schedule(sampling).timesteps)

    constants = find_constants(model, sampling, dit)
    return make_step_plan(sampling, constants, projections, not config.runtime.reference_numerics)


def _coders(config: PipelineConfig) -> str:
    """What decodes and encodes pictures."""
    from omniavatar.accel.vae_runners import VAES

    model, runner = config.model, config.runtime.vae
    if runner in VAES.names and not VAES.get(runner).exact:
        return f"the VAE, vae: {runner}, which is not exact, in both directions"
    if model.latent_encoder != "full":
        return f"{model.decoder} (it encodes too)"
    return "the VAE" if model.decoder == "full" else f"{model.decoder} (the VAE encodes)"


def _print(
    plan: RunPlan, memory: MemoryEstimate, coders: str, attention: str, length: str, shape: str
) -> None:
    from rich.table import Table

    from omniavatar.cli.terminal import SafeConsole
    from omniavatar.types import bytes_text

    height, width = plan.size
    computed = plan.step_plan.computed if plan.step_plan else None
    pattern = _pattern_text(plan) if plan.step_plan else "not known without the weights"
    policy = plan.step_plan.policy if plan.step_plan else "teacache"
    text = f"{bytes_text(memory.text_encoder)}, only while new prompts are embedded"
    text = text if memory.text_encoder else "none: the model takes no text"
    rows = [
        (
            "video",
            f"{plan.frames} frames, {plan.duration_s:.2f} s at {plan.fps:g} fps, "
            f"{width} x {height} (width x height)",
        ),
        ("length", length),
        ("shape", shape),
        ("windows", _windows_text(plan)),
        ("one window", f"{plan.latent_frames} latent frames, {plan.tokens} tokens"),
        ("steps", f"{plan.steps}: {computed if computed is not None else '?'} computed (cache: {policy})"),
        ("pattern", pattern),
        ("passes per step", _passes_text(plan)),
        ("forwards", f"{plan.forwards} passes of the model computed, {plan.forwards_skipped} skipped"),
        *([] if attention == "dense" else [("attention", _attention_text(plan))]),
        ("decoder", coders),
        ("DiT weights", bytes_text(memory.dit)),
        ("VAE weights", bytes_text(memory.vae)),
        ("audio encoder", bytes_text(memory.audio_encoder)),
        ("text encoder", text),
        ("activations", f"about {bytes_text(memory.activations)}"),
        (
            "device memory",
            f"peak of about {bytes_text(memory.device_peak)} with everything on the device",
        ),
        ("on this machine", memory.choice.removeprefix("memory: ")),
        ("audio features", f"{bytes_text(memory.audio_features_file)} on disk"),
    ]
    table = Table(show_header=False, pad_edge=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    for name, text in rows:
        table.add_row(name, text)
    console = SafeConsole()
    console.print(table)
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    if memory.assumed_scale is not None:
        console.print(
            f"note: the weights are not on this disk; the memory shown is that of the {memory.assumed_scale} "
            "model",
            soft_wrap=True,
        )


def _windows_text(plan: RunPlan) -> str:
    causal = plan.causal
    if plan.chunk is not None:
        chunks = "1 chunk" if len(plan.windows) == 1 else f"{len(plan.windows)} chunks"
        return f"{chunks} of {plan.chunk.frames} frames, {plan.chunk.new} of them new"
    if causal is None:
        number = "1 window" if len(plan.windows) == 1 else f"{len(plan.windows)} windows"
        return f"{number} of {plan.window_length} frames, {plan.overlap} of them from the one before"
    return (
        f"{len(plan.windows)} blocks of {plan.window_length} frames (the first: {plan.windows[0].length}); "
        f"each sees {causal.window} latents, the video's first {causal.sink} among them"
    )


def _attention_text(plan: RunPlan) -> str:
    sparse = plan.sparsity
    if sparse is None:
        return "calibrated; the blocks are not known without the weights"
    dense = plan.steps - len(sparse.sparse_steps)
    mass = "" if sparse.mass is None else f", at least {sparse.mass:.1%} of each row's softmax"
    return (
        f"{sparse.name}: {sparse.kept_share:.1%} of the matrix at {len(sparse.sparse_steps)} of {plan.steps} "
        f"steps{mass}; {dense} dense, blocks of {sparse.shape.block} tokens"
    )


def _pattern_text(plan: RunPlan) -> str:
    """The pattern, or each branch's own where they differ."""
    patterns = plan.branch_patterns
    if len(set(patterns.values())) == 1:
        text = next(iter(patterns.values()))
    else:
        text = ", ".join(f"{pattern} ({name})" for name, pattern in patterns.items())
    letters = {"C": "computed", "s": "skipped", "-": "not run"}
    used = "".join(patterns.values())
    return f"{text}; " + ", ".join(f"{letter}: {word}" for letter, word in letters.items() if letter in used)


def _passes_text(plan: RunPlan) -> str:
    guided = f"{len(plan.branches)}: {', '.join(branch.name for branch in plan.branches)}"
    return (
        guided
        if plan.guided == plan.steps
        else f"{guided}; at {plan.guided} of {plan.steps} steps, 1 at the others"
    )
