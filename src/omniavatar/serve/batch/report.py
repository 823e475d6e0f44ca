"""The content of `summary.json`."""

from __future__ import annotations

from typing import Any

from omniavatar.serve.batch.ledger import Ledger, Slot


def summary(ledger: Ledger) -> dict[str, Any]:
    """Counts, real-time factor, utilization of every worker, pauses between items, failures.

    real_time_factor: wall seconds of the batch per second of video.
    mean_pause_seconds: mean pause of a worker between two items while others were queued.
    pause_share: those pauses as a share of pauses and work.
    utilization: share of a worker's `ready_seconds` spent on items.
    """
    states = ledger.states
    counts = {name: 0 for name in ("queued", "running", "done", "failed")}
    for state in states.values():
        counts[state.state] += 1
    video = sum(slot.video_seconds for slot in ledger.slots)
    busy = sum(slot.busy for slot in ledger.slots)
    gaps = sum(slot.gaps for slot in ledger.slots)
    paused = sum(slot.gap_seconds for slot in ledger.slots)
    return {
        "items": len(states),
        "done": counts["done"] - len(ledger.skipped),
        "skipped": len(ledger.skipped),
        "failed": counts["failed"],
        "remaining": counts["queued"] + counts["running"],
        "wall_seconds": ledger.wall,
        "video_seconds": video,
        "real_time_factor": ledger.wall / video if video else None,
        "mean_pause_seconds": paused / gaps if gaps else None,
        "pause_share": paused / (paused + busy) if gaps else None,
        "stopped_by": "interrupted" if ledger.interrupted else str(ledger.error) if ledger.error else None,
        "workers": [_worker(slot) for slot in ledger.slots],
        "failures": [
            {"item": state.key, "line": state.line, "error_class": state.error_class, "error": state.error}
            for state in states.values()
            if state.state == "failed"
        ],
    }


def _worker(slot: Slot) -> dict[str, Any]:
    known = slot.known
    return {
        "worker": slot.number,
        "host": known.host if known else None,
        "device": known.device if known else None,
        "gpus": known.gpus if known else None,
        "done": slot.done,
        "failed": slot.failed,
        "starts": slot.starts,
        "lost": slot.lost,
        "busy_seconds": slot.busy,
        "ready_seconds": slot.present,
        "utilization": slot.busy / slot.present if slot.present else None,
        "video_seconds": slot.video_seconds,
        "closed_reason": slot.closed or None,
    }
