"""Runs `make fuzz`: damaged files of every kind against their readers, bounded by time.

    PYTHONPATH=tests python -m fuzz [--seconds 1800] [--seed 0] [--workers 2] [--kinds picture,sound]
    PYTHONPATH=tests python -m fuzz --show 1234 --seed 0        # writes input 1234 to build/fuzz and reads it

Ends with 1 if an input ended in anything but a result or a documented error, took more than 10 s, or more
than 2 GiB. Such inputs are kept in build/fuzz.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from fuzz.targets import make_targets
from fuzz.watch import Outcome, fuzz, input_of, run_input

KEPT = Path("build/fuzz")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kinds", help="comma-separated; default: all")
    parser.add_argument("--show", type=int, help="number of an input to write and read in this process")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        targets = make_targets(Path(place))
        kinds = options.kinds.split(",") if options.kinds else list(targets)
        if unknown := set(kinds) - set(targets):
            parser.error(f"--kinds: {', '.join(sorted(unknown))} unknown; use some of {', '.join(targets)}")
        if options.show is not None:
            kind, ending, content = input_of(targets, kinds, options.seed, options.show)
            print(kept(kind, options.show, ending, content))
            print(run_input(targets[kind], Path(place), ending, content) or "read, or refused in one line")
            return 0
        outcome = Outcome()
        for outcome in fuzz(kinds, options.seed, options.workers, options.seconds):
            total = sum(outcome.inputs.values())
            print(f"\r{total:,} inputs, {len(outcome.faults)} faults", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        for fault in outcome.faults:
            kind, ending, content = input_of(targets, kinds, options.seed, fault.number)
            print(f"{kept(kind, fault.number, ending, content)}\n{fault.problem}\n")
    print("\n".join(f"{kind:16} {count:,}" for kind, count in outcome.inputs.items()))
    count, most = sum(outcome.inputs.values()), outcome.most_bytes / 2**20
    print(f"{count:,} inputs, {len(outcome.faults)} faults; seed {options.seed}")
    print(f"slowest {outcome.slowest:.1f} s of CPU, most memory {most:.0f} MiB")
    return 1 if outcome.faults else 0


def kept(kind: str, number: int, ending: str, content: bytes) -> Path:
    """Write an input to `KEPT`; returns its path."""
    KEPT.mkdir(parents=True, exist_ok=True)
    path = KEPT / f"{kind.strip('.')}_{number}{ending}"
    path.write_bytes(content)
    return path


if __name__ == "__main__":
    sys.exit(main())
