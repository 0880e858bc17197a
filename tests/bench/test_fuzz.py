"""The fuzzer repeats an input by its number, and finds nothing in two minutes."""

import subprocess
import sys

import pytest
from helpers import ROOT

from bench.reliability.fuzz.values import Dice


def fuzz(*arguments):
    command = [sys.executable, "-m", "bench.reliability.fuzz", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_an_input_follows_from_seed_and_number():
    assert [Dice(3, 7).value() for _ in range(3)] == [Dice(3, 7).value() for _ in range(3)]
    assert [Dice(3, n).bytes(b"x" * 64) for n in range(9)] != [Dice(4, n).bytes(b"x" * 64) for n in range(9)]


@pytest.mark.slow
def test_nothing_goes_wrong_in_two_minutes(tmp_path):
    done = fuzz("--seconds", 120, "--out", tmp_path / "wrong.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 wrong in 0 classes" in done.stderr
