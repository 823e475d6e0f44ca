"""One profiled run: the ordinary pipeline with a recorder that keeps everything.

Videos are made from the start, never resumed, so that every part is measured. They go to
`<output_dir>/profile`, so that unfinished work of an ordinary run stays untouched.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from omniavatar import __version__
from omniavatar.checkpoint.vae import inspect_vae
from omniavatar.config.change import changed
from omniavatar.config.schema import ModelConfig, PipelineConfig
from omniavatar.device import choose_device, torch_dtype
from omniavatar.engine.pipeline import AvatarPipeline
from omniavatar.engine.recorder import Listener
from omniavatar.engine.requests_file import RequestLine
from omniavatar.measure.ceilings import ceilings, fp8_ceilings
from omniavatar.measure.kernels import KernelTrace
from omniavatar.measure.peaks import PeakMemory
from omniavatar.measure.report import ModelSizes, Report, RequestFigures, build_report
from omniavatar.measure.trace import TraceRecorder, chrome_trace
from omniavatar.model.sizes import VAEConfig
from omniavatar.plan.preview import model_spec
from omniavatar.sampling.causal import CausalWindow
from omniavatar.sampling.chunks import ChunkRule, plan_chunks
from omniavatar.sampling.windows import anchored, plan_blocks, plan_windows
from omniavatar.types import RunResult

FOLDER = "profile"


@dataclass(frozen=True)
class ProfiledRun:
    """What ran and on what, the report, and the stages and steps as a Chrome trace.

    memory: the plan of `plan.memory`. kernel_trace_window: the window whose kernels were traced, if any.
    """

    device: str
    dtype: str
    weights: str
    attention: str
    quantize: str
    memory: Mapping[str, Any]
    vae: str
    decoder: str
    kernel_trace_window: int | None
    peak_memory: PeakMemory
    report: Report
    trace: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the trace, with versions, for JSON."""
        about = {name: value for name, value in vars(self).items() if name not in ("report", "trace")}
        return {
            "command": "profile",
            "omniavatar": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **about,
            "peak_memory": asdict(self.peak_memory),
            **self.report.as_dict(),
        }


def profile_requests(
    config: PipelineConfig,
    lines: Sequence[RequestLine],
    listeners: Sequence[Listener] = (),
    kernels: Path | None = None,
) -> ProfiledRun:
    """Generate every line and report on it. kernels: file for a torch.profiler trace of one window.

    Raises what `AvatarPipeline.generate` raises.
    """
    device = choose_device(config.runtime.device)
    on_gpu = device.type == "cuda"
    taker = None if kernels is None else KernelTrace(kernels, on_gpu)
    recorder = TraceRecorder([*listeners, *([taker] if taker else [])])
    folder = config.output.output_dir / FOLDER
    config = changed(config, output={"output_dir": folder, "keep_job": False})
    ceiling = ceilings(device, torch_dtype(config.model.dtype))
    started = time.perf_counter()
    pipeline = AvatarPipeline.from_config(config, recorder=recorder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = []
    for line in lines:
        result = pipeline.generate(line.request(), line.target(config), resume=False, index=line.index)
        figures.append(_figures(result))
    seconds = time.perf_counter() - started
    if taker is not None:
        taker.stop()
    loaded, placement = pipeline.models, pipeline.models.residency.placement
    models = ModelSizes(loaded.dit_config, _vae_sizes(config.model))
    spans = recorder.spans()
    report = build_report(spans, recorder.timings(), figures, models, ceiling, fp8_ceilings(device), seconds)
    return ProfiledRun(
        device=ceiling.device,
        dtype=config.model.dtype,
        weights=config.model.weights,
        attention=loaded.attention_name,
        quantize=placement.quantize,
        memory=placement.memory.as_dict(),
        vae=loaded.vae_name,
        decoder=config.model.decoder,
        kernel_trace_window=None if taker is None else taker.window,
        peak_memory=PeakMemory.now(loaded.device),
        report=report,
        trace=chrome_trace(spans),
    )


def _vae_sizes(model: ModelConfig) -> VAEConfig | None:
    """Sizes of the VAE, or None where another decoder ran."""
    if model.decoder != "full":
        return None
    if model.weights == "random":
        return model_spec(model).vae
    assert model.vae_path is not None
    return inspect_vae(model.vae_path)


def _figures(result: RunResult) -> RequestFigures:
    """The figures of a request, from the sidecar that the pipeline wrote."""
    record = json.loads(result.sidecar.read_text(encoding="utf-8"))
    plan = record["plan"]
    height, width = plan["size"]
    causal = CausalWindow(**plan["causal"]) if "causal" in plan else None
    after_portrait, anchor_every = plan["frames"] - 1, plan.get("anchor_every", 0)
    if "chunk" in plan:
        windows = plan_chunks(plan["frames"], ChunkRule(**plan["chunk"]))
    elif causal is None:
        windows = plan_windows(after_portrait, plan["window_length"], plan["overlap"])
    else:
        windows = plan_blocks(after_portrait, causal.block)
    return RequestFigures(
        output=str(result.output),
        frames=result.frames,
        fps=plan["fps"],
        seconds=result.seconds,
        size=(height, width),
        windows=anchored(windows, anchor_every),
        tokens=plan["tokens"],
        steps=plan["steps"],
        pattern=plan["pattern"],
        branches=len(plan["branches"]),
        forwards=plan["forwards"],
        forwards_skipped=plan["forwards_skipped"],
        causal=causal,
        kept_share=plan["sparsity"]["kept_share_of_forwards"] if "sparsity" in plan else 1.0,
        hand_over=record["config"]["sampling.hand_over"],
    )
