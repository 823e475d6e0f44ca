"""Plots of the pocket benchmark; runs in the environment of `faces.py`, which has matplotlib.

`plot.py RESULT.json OUT_DIR` draws `pocket_tradeoff.png`, `pocket_sparse.png` (of clips of a minute
`pocket_sparse_minute.png`) and `pocket_identity.png`, each only if the result has its part.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def tradeoff(rows: list[dict], front: list[str], choice: str, out: Path) -> None:
    """Plot lip sync and sharpness over time, one colour for each group."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), dpi=110)
    groups = list(dict.fromkeys(row["group"] for row in rows))
    for axis, key, name in zip(
        axes, ("correlation", "sharpness"), ("lip sync (r)", "sharpness"), strict=True
    ):
        for number, group in enumerate(groups):
            part = [row for row in rows if row["group"] == group]
            axis.scatter(
                [row["seconds_a_second"] for row in part],
                [row[key] for row in part],
                color=f"C{number}",
                label=group,
                s=26,
            )
        for row in rows:
            weight = "bold" if row["variant"] == choice else "normal"
            place = (row["seconds_a_second"], row[key])
            axis.annotate(
                row["variant"], place, fontsize=5.5, weight=weight, xytext=(2, 2), textcoords="offset points"
            )
        axis.set_xscale("log")
        axis.set_xlabel("seconds of work a second of video")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    by_name = {row["variant"]: row for row in rows}
    line = [by_name[name] for name in front]
    axes[0].plot(
        [row["seconds_a_second"] for row in line], [row["correlation"] for row in line], color="0.4", lw=1
    )
    axes[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(out / "pocket_tradeoff.png")


def sparse(rows: list[dict], dense: dict | None, out: Path) -> None:
    """Plot likeness to dense attention, lip sync and drift over the share of attention that is computed."""
    drifts = {"picture": "-", "face_shape": ":"} if "drift" in rows[0] else {}
    panels = 3 if drifts else 2
    figure, axes = plt.subplots(1, panels, figsize=(4.5 * panels, 3.6), dpi=110)
    for plan in ("calibrated", "window"):
        part = sorted((row for row in rows if plan in row["variant"]), key=lambda row: row["kept_share"])
        shares = [100 * row["kept_share"] for row in part]
        axes[0].plot(shares, [row["psnr_db"] for row in part], "o-", label=plan)
        axes[1].plot(shares, [row["correlation"] for row in part], "o-", label=plan)
        color = axes[1].lines[-1].get_color()
        for name, style in drifts.items():
            values, label = [row["drift"][name] for row in part], f"{plan}, {name.replace('_', ' ')}"
            axes[2].plot(shares, values, f"o{style}", color=color, label=label)
    if dense is not None:
        axes[1].axhline(dense["correlation"], color="0.4", lw=1, ls="--", label="dense")
        for name, style in drifts.items():
            label = f"dense, {name.replace('_', ' ')}"
            axes[2].axhline(dense["drift"][name], color="0.4", lw=1, ls=style, label=label)
    axes[0].set_ylabel("PSNR to dense attention, dB")
    axes[1].set_ylabel("lip sync (r)")
    if drifts:
        axes[2].set_ylabel("drift / distance of two people")
    for axis in axes:
        axis.set_xlabel("attention computed in sparse steps, %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / ("pocket_sparse_minute.png" if drifts else "pocket_sparse.png"))


def identity(curve: dict, out: Path) -> None:
    """Plot the distance to the portrait over time, as a share of the distance of two people."""
    figure, axis = plt.subplots(figsize=(7, 3.6), dpi=110)
    for name, values in curve["curves"].items():
        axis.plot(curve["seconds"], values, label=name.replace("_", " "))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("second of the video")
    axis.set_ylabel("distance to the portrait / of two people")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "pocket_identity.png")


def main() -> None:
    result, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    if result.get("tradeoff"):
        part = result["tradeoff"]
        rows = {row["variant"]: row for row in part["rows"]}
        if {row["group"] for row in part["rows"]} - {"default", "sparse"}:
            tradeoff(part["rows"], part["front"], part["recommended"], out)
        if thinned := [row for row in part["rows"] if row["group"] == "sparse"]:
            sparse(thinned, rows.get("default"), out)
    if "identity" in (result.get("made") or {}):
        identity(result["made"]["identity"], out)


if __name__ == "__main__":
    main()
