"""A short, seeded run of the fuzzer, and tests that it finds what it must find."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz.mutate import mutated
from fuzz.targets import TRAPS, Target, make_targets
from fuzz.watch import fuzz, input_of, run_input
from omniavatar.errors import InputError

INPUTS = 1_500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def targets(folder: Path) -> Iterator[dict[str, Target]]:
    return make_targets(folder)


def test_good_files_are_read(targets: dict[str, Target], folder: Path) -> None:
    """Or the damaged ones are all refused for the same reason."""
    for target in targets.values():
        if target.name == "model_config":  # the folder has no weights
            continue
        for number, content in enumerate(target.good):
            path = folder / f"good{target.endings[0]}"
            path.write_bytes(content)
            try:
                target.read(path)
            except Exception as error:
                raise AssertionError(f"{target.name} {number}") from error


def test_the_same_seed_gives_the_same_inputs(targets: dict[str, Target]) -> None:
    kinds = list(targets)
    first, again = ([input_of(targets, kinds, 3, number) for number in range(60)] for _ in range(2))
    assert first == again
    assert first != [input_of(targets, kinds, 4, number) for number in range(60)]


def test_most_inputs_differ_from_the_good_ones(targets: dict[str, Target]) -> None:
    for target in targets.values():
        dice = random.Random(0)
        changed = sum(mutated(dice, target.good, target.text) not in target.good for _ in range(100))
        assert changed >= 90, target.name


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (InputError("x.png: is damaged; save it again"), False),
        (InputError(" "), True),
        (KeyError("x"), True),
        (RecursionError(), True),
        (SystemExit(0), True),
    ],
)
def test_only_documented_errors_are_no_fault(error: BaseException, found: bool, tmp_path: Path) -> None:
    def read(path: Path) -> None:
        raise error

    assert bool(run_input(Target("x", [b"x"], (".x",), False, read), tmp_path, ".x", b"x")) is found


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
def test_damaged_files_are_read_or_refused_in_one_line(
    half: int, targets: dict[str, Target], tmp_path: Path
) -> None:
    """In this process, where a crash or a hang fails the run; `make fuzz` watches processes instead."""
    kinds = list(targets)
    for number in range(half, INPUTS, 2):
        kind, ending, content = input_of(targets, kinds, 0, number)
        began = time.process_time()
        problem = run_input(targets[kind], tmp_path, ending, content)
        assert problem is None, f"python -m fuzz --show {number}: {kind}\n{problem}"
        assert time.process_time() - began < 10, (number, kind)


def caught(traps: str, most_s: float, monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """What the watcher finds among 24 inputs, by number. Its processes read the kind `trap`."""
    monkeypatch.setenv(TRAPS, traps)
    *_, outcome = fuzz(["trap"], seed=0, workers=2, inputs=24, most_s=most_s)
    assert outcome.inputs["trap"] >= 24 - 3, "it goes on after each"
    return {fault.number: fault.problem for fault in outcome.faults}


@pytest.mark.slow
def test_the_watcher_finds_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    assert caught("3", 5, monkeypatch) == {3: "no end after 5 s"}


@pytest.mark.slow
def test_the_watcher_finds_crashes_memory_and_wrong_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = caught("5,8,11,13", 300, monkeypatch)
    assert sorted(problems) == [5, 8, 11, 13]
    assert problems[5] == "the process ended with -9" and problems[8] == "more than 2 GiB"
    assert "ZeroDivisionError" in problems[11]
    assert "several lines" in problems[13] or "empty message" in problems[13]


@pytest.mark.slow
def test_the_watcher_ends_where_its_processes_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRAPS, raising=False)
    with pytest.raises(RuntimeError, match="did not start"):
        list(fuzz(["trap"], seed=0, workers=1, inputs=1))
