"""Feed damaged files, runs, requests and commands to wbdit, and count what goes wrong.

    python -m bench.reliability.fuzz [--count N | --seconds S] [--seed 0] [--from 0] [--only NUMBER] [--out FILE]

Each input follows from the seed and its number. It is tried in a child process with 5 s of processor time and 1 GB of
memory beyond what the process has after its imports. Wrong are: a crash, a hang, more memory, any error but InputError,
and generated cells that are not finite or not whole. The exit status is 1 if anything is wrong. --only NUMBER repeats
one input and shows its traceback.
"""

import argparse
import json
import logging
import mmap
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

PROCESSOR_SECONDS, SECONDS = 5, 400  # per input: of the processor, and of the clock, as for a pipe without a writer
MEMORY = 10**9  # bytes
BATCH = 200  # inputs per child


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.reliability.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--only", type=int)
    parser.add_argument("--out", type=Path, default=Path("bench/out/fuzz.jsonl"))
    given = parser.parse_args()
    if given.only is not None:
        given.first, given.count = given.only, 1
    folder = Path(tempfile.mkdtemp(prefix="wbdit-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        return Fuzzer(folder, given).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Fuzzer:
    """Runs inputs in child processes and collects what goes wrong."""

    def __init__(self, folder, given):
        import torch

        torch.set_num_threads(1)
        logging.getLogger("wbdit").setLevel(logging.CRITICAL)
        from bench.reliability.fuzz.targets import Targets

        self.given = given
        self.targets = Targets(folder)
        self.state = mmap.mmap(-1, 24)  # number of the input, and how many were refused and used
        self.wrong = Counter()
        self.refused = self.used = 0
        given.out.parent.mkdir(parents=True, exist_ok=True)

    def run(self):
        began = time.monotonic()
        number, end = self.given.first, self.given.first + self.given.count
        while number < end and time.monotonic() - began < self.given.seconds:
            number = self._batch(number, min(number + BATCH, end))
            self._report(number - self.given.first, time.monotonic() - began)
        return 1 if self.wrong else 0

    def _batch(self, first, last):
        """Try inputs in one child; return the number of the next one."""
        self.state[:] = struct.pack("qqq", first, 0, 0)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            self._try(first, last, writing)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as lines:
            for line in lines:
                self._wrong(**json.loads(line))
        _, status = os.waitpid(child, 0)
        at, refused, used = struct.unpack("qqq", self.state[:])
        self.refused, self.used = self.refused + refused, self.used + used
        if status == 0:
            return last
        name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
        word = "hang" if name in ("SIGPROF", "SIGALRM") else "crash"
        self._wrong(at, self._kind(at), f"{word} {name}", "")
        return at + 1

    def _try(self, first, last, writing):
        from bench.reliability.fuzz.values import Dice

        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        refused = used = 0
        for number in range(first, last):
            self.state[:] = struct.pack("qqq", number, refused, used)
            signal.setitimer(signal.ITIMER_PROF, PROCESSOR_SECONDS)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                answer = self.targets.run(Dice(self.given.seed, number))
                refused, used = refused + (answer == "refused"), used + (answer == "used")
            except BaseException as error:
                text = "".join(traceback.format_exception(error))
                found = {"number": number, "kind": self._kind(number), "what": _class(error), "text": text[-3000:]}
                os.write(writing, (json.dumps(found) + "\n").encode())
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.state[:] = struct.pack("qqq", last, refused, used)

    def _kind(self, number):
        from bench.reliability.fuzz.values import Dice

        return self.targets.kind_of(Dice(self.given.seed, number))

    def _wrong(self, number, kind, what, text):
        key = f"{kind}: {what}"
        self.wrong[key] += 1
        if self.wrong[key] <= 5:
            with self.given.out.open("a") as file:
                file.write(json.dumps({"seed": self.given.seed, "number": number, "class": key, "text": text}) + "\n")
        if self.wrong[key] == 1:
            print(f"{key}\n  python -m bench.reliability.fuzz --seed {self.given.seed} --only {number}", flush=True)
        if self.given.only is not None:
            print(text, flush=True)

    def _report(self, done, seconds):
        print(
            f"{done:,} inputs in {seconds:,.0f} s ({done / seconds:.0f} per s): {self.refused:,} refused, "
            f"{self.used:,} used, {sum(self.wrong.values()):,} wrong in {len(self.wrong)} classes",
            file=sys.stderr,
            flush=True,
        )


def _class(error):
    """Return the class of an error: its type, and the deepest place in wbdit that it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/wbdit/" in frame.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "elsewhere"
    return f"{type(error).__name__} at {place}"


if __name__ == "__main__":
    sys.exit(main())
