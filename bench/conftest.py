"""Shared parts of all benchmarks: options, the check before each timing, and the report at the end."""

import json
from pathlib import Path

import pytest
from configs import configs
from record import Record
from tables import markdown
from timing import PRODUCTS, QUICK, Settings, clock

RECORD = pytest.StashKey[Record]()


def pytest_addoption(parser):
    group = parser.getgroup("wbdit")
    group.addoption("--quick", action="store_true", help="Tiny sizes and five rounds: tests the code, no result.")
    group.addoption("--out", type=Path, default=Path(__file__).parent / "out", help="Folder for bench.json.")


def pytest_configure(config):
    config.stash[RECORD] = Record(config.option.quick, QUICK if config.option.quick else Settings())


def pytest_generate_tests(metafunc):
    if "config" in metafunc.fixturenames:
        every = configs(metafunc.config.option.quick)
        metafunc.parametrize("config", every.values(), ids=every.keys())


@pytest.fixture
def quick(request):
    return request.config.option.quick


@pytest.fixture
def record(request):
    return request.config.stash[RECORD]


@pytest.fixture
def timed(benchmark, record):
    """Return a function that times a row if its check passes, and fails if not.

    Before each round of a denoiser's row, its baseline and the product that sets its floor run once; the ratios use
    their times. `fresh` creates the argument of a step and is not timed.
    """

    def timed(subject, error, step, fresh=None, baseline=None):
        if not error <= subject.tolerance:  # in this form NaN fails
            record.red.add(subject.id)
            message = f"{subject.id}: error {error:.1e} against fp64, {subject.tolerance:.0e} allowed"
            pytest.fail(f"{message}; not timed", pytrace=False)
        baselines, products = [], []

        def before():
            if baseline is not None:
                baselines.append(clock(baseline))
            products.append(clock(multiply) / PRODUCTS)
            return (() if fresh is None else (fresh(),)), {}

        rounds, iterations = (record.settings.fewest, 1) if fresh else record.settings.plan(step)
        if subject.what.startswith("op "):  # too short to time single calls
            benchmark.pedantic(step, rounds=rounds, iterations=iterations, warmup_rounds=1)
        else:
            iterations, multiply = 1, record.product_step(*subject.product, subject.precision)
            benchmark.pedantic(step, setup=before, rounds=rounds, warmup_rounds=1)
        times = list(benchmark.stats.stats.data)
        record.add(subject, times, iterations, error, baselines[-len(times) :], products[-len(times) :])

    return timed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed or report.skipped:
        what, reason = item.name.removeprefix("bench_"), call.excinfo.value
        line = str(reason).strip().splitlines() or [type(reason).__name__]
        item.config.stash[RECORD].absent.append({"what": what, "why": line[0], "failed": report.failed})
    return report


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return
    result = config.stash[RECORD].as_json()
    out = config.option.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    terminalreporter.write_line(markdown(result))
    terminalreporter.write_line(f"\nwrote {out / 'bench.json'}")
