"""Shared fixtures: synthetic cells, recorded reference tensors, and uninitialized memory filled with NaN."""

import json
import logging
import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: threads of several workers wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from helpers import GOLDEN, make_cells
from safetensors import safe_open

if os.environ.get("WBDIT_TEST_ENGINE") == "triton":  # with TRITON_INTERPRET=1: GPU kernels on CPU tensors
    import interpreter

    from wbdit.ops import triton as engine

    interpreter.install()
    engine.register("cpu")


@pytest.fixture(scope="session", autouse=True)
def _signals_arrive():
    """Handle signals that a shell may have set to be ignored, as for a background job or under nohup."""
    handlers = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL}
    own = {getattr(signal, name): handler for name, handler in handlers.items() if hasattr(signal, name)}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """Fill uninitialized memory with NaN, so that an output that is never written fails the test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def log(caplog):
    """Return a list that collects the log lines of the package."""
    caplog.set_level(logging.INFO, "wbdit")
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("wbdit").addHandler(handler)
    yield lines
    logging.getLogger("wbdit").removeHandler(handler)


@pytest.fixture(scope="session")
def golden():
    """Return the tensors recorded from the published implementation, by name, and its configuration."""
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["config"])
        return {name: file.get_tensor(name) for name in file.keys()}, config  # noqa: SIM118


@pytest.fixture(scope="session")
def cells():
    """Return 60 synthetic cells by 30 genes: counts in X, three types in obs["type"]."""
    return make_cells(60, 30)
