"""Compiling the CPU kernels: once, into a folder that only the user can write to, and never a partial library."""

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from wbdit import cli
from wbdit.ops import build

COMPILER = next(filter(None, map(shutil.which, build.COMPILERS)), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")

ANSWER = 'extern "C" __attribute__((visibility("default"))) int answer() { return %s; }\n'
OP = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include "factor.h"
using torch::stable::Tensor;
Tensor scaled(Tensor x) {
  Tensor y = torch::stable::empty_like(x);
  for (int64_t i = 0; i < x.numel(); ++i) y.mutable_data_ptr<float>()[i] = factor() * x.const_data_ptr<float>()[i];
  return y;
}
STABLE_TORCH_LIBRARY(wbdit_test_build, m) { m.def("scaled(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(wbdit_test_build, CPU, m) { m.impl("scaled", TORCH_BOX(&scaled)); }
"""


class Place:
    """A folder of sources, a cache, and a compiler that counts its calls."""

    def __init__(self, folder):
        self.sources, self.cache, self.temporary = folder / "csrc", folder / "cache", folder / "tmp"
        self.compiler, self.calls = folder / "counting-compiler", folder / "calls"
        self.sources.mkdir()
        self.temporary.mkdir()
        self.write("answer.cpp", ANSWER % 42)
        self.compile_with()

    def write(self, name, text):
        (self.sources / name).write_text(text)

    def compile_with(self, before=""):
        """Make the compiler run shell code before it compiles or links."""
        script = f'case "$*" in *--version*) ;; *) echo x >>{shlex.quote(str(self.calls))}\n{before}\n;; esac\n'
        self.compiler.write_text(f'#!/bin/sh\n{script}exec {shlex.quote(COMPILER)} "$@"\n')
        self.compiler.chmod(0o755)

    def n_calls(self):
        return self.calls.read_text().count("x") if self.calls.exists() else 0

    def libraries(self):
        return set(self.cache.glob("wbdit_cpu-*"))

    def process(self, code):
        """Start another Python process with these sources."""
        sources = f"build.source_dir = lambda: Path({str(self.sources)!r})"
        code = f"from pathlib import Path\nfrom wbdit.ops import build\n{sources}\n{code}"
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def place(tmp_path, monkeypatch):
    place = Place(tmp_path)
    state = {"_outcome": None, "_why": "", "_fault": "", "_warned": False}
    for name, value in {**state, "source_dir": lambda: place.sources}.items():
        monkeypatch.setattr(build, name, value)
    monkeypatch.setenv("WBDIT_CACHE", str(place.cache))
    monkeypatch.setenv("CXX", shlex.quote(str(place.compiler)))
    monkeypatch.delenv("WBDIT_CXXFLAGS", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(place.temporary))
    return place


@pytest.fixture
def no_compiler(place, monkeypatch):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(place.temporary))


@pytest.fixture
def no_home(place, monkeypatch):
    """Set a cache folder that cannot be created, even by root."""
    (place.cache.parent / "file").touch()
    monkeypatch.delenv("WBDIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.cache.parent / "file"))


def _answer(library):
    return ctypes.CDLL(str(library)).answer()


# compiled once, and again after a change


def test_an_op_is_built_and_loaded(place, log):
    place.write("op.cpp", OP)
    place.write("factor.h", "float factor();\n")
    place.write("factor.cpp", '#include "factor.h"\nfloat factor() { return 2; }\n')
    assert build.status().startswith("not built yet")
    assert build.available()
    assert torch.ops.wbdit_test_build.scaled(torch.tensor([1.0, 3.0])).tolist() == [2.0, 6.0]
    assert len(log) == 1
    assert log[0].startswith("wbdit: compiling the CPU kernels")
    assert place.n_calls() == 3 + 1  # three files and one link
    (library,) = place.libraries()
    assert build.status() == f"compiled here, {library}"
    assert library.stat().st_mode & 0o777 == 0o600
    assert place.cache.stat().st_mode & 0o777 == 0o700

    build.load()
    assert build.build() == library
    assert build.available()
    assert place.n_calls() == 4
    assert len(log) == 1


def test_two_processes_compile_once(place):
    place.compile_with("sleep 1")
    code = "import ctypes\nbuild.load()\nprint(ctypes.CDLL(str(build.build())).answer())"
    processes = [place.process(code) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [out for out, _ in outputs] == ["42\n", "42\n"]
    assert sorted(err.count("compiling") for _, err in outputs) == [0, 1]
    assert place.n_calls() == 2


def test_what_changes_makes_a_new_library(place, monkeypatch):
    place.write("answer.h", "")
    libraries = [build.build()]
    place.write("answer.cpp", ANSWER % 43)
    libraries.append(build.build())
    place.write("answer.h", "// a word")
    libraries.append(build.build())
    monkeypatch.setattr(torch, "__version__", "99.0")
    libraries.append(build.build())
    monkeypatch.setenv("WBDIT_CXXFLAGS", "-DWORD='two words'")
    libraries.append(build.build())
    assert place.libraries() == set(libraries)
    assert len(place.libraries()) == 5
    assert [_answer(library) for library in libraries] == [42, 43, 43, 43, 43]
    assert build.build() == libraries[-1]
    assert place.n_calls() == 10


def test_a_source_saved_meanwhile(place):
    place.compile_with(f"echo >>{shlex.quote(str(place.sources / 'answer.cpp'))}")
    with pytest.raises(build.BuildError, match="try again"):
        build.build()
    assert place.libraries() == set()


def test_libraries_out_of_use_are_swept(place):
    month = time.time() - 31 * 86400
    old = build.build()
    place.write("answer.cpp", ANSWER % 43)
    used = build.build()
    os.utime(old, (month, month))
    os.utime(used, (month, month))
    assert build.build() == used  # now last used today
    place.write("answer.cpp", ANSWER % 44)
    assert place.libraries() | {build.build()} == {old, used, build.build()}
    assert place.libraries() == {used, build.build()}


# the wheel's library


def test_a_prebuilt_library_comes_first(place, log, monkeypatch, request):
    """The wheel's library needs no compiler and serves any PyTorch version, but only these sources and flags."""
    prebuilt = build.compile_for_wheel(place.sources, ['extern "C" int added() { return 7; }\n'])
    assert prebuilt.parent == place.sources
    assert (_answer(prebuilt), place.n_calls()) == (42, 3)  # two files and one link
    assert build.build() == prebuilt
    assert build.status() == f"prebuilt, {prebuilt}"
    assert not place.cache.exists()
    assert not log

    monkeypatch.setenv("WBDIT_CXXFLAGS", "-DWORD=2")
    assert build.status().startswith("not built yet")
    monkeypatch.delenv("WBDIT_CXXFLAGS")
    request.getfixturevalue("no_compiler")
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert build.available()
    place.write("answer.cpp", ANSWER % 43)
    assert build.status().startswith("cannot be built, no C++ compiler")


def test_a_prebuilt_library_that_does_not_load(place, log):
    """One of a newer Linux, for example: it is reported once, and a library is compiled."""
    build.compile_for_wheel(place.sources, []).write_bytes(b"not a library")
    assert _answer(build.build()) == 42
    assert build.status().startswith(f"compiled here, {place.cache}")
    assert build.available()
    assert [line.split(":")[1] for line in log] == [
        " the prebuilt CPU kernels do not load here, so they are compiled",
        f" compiling the CPU kernels into {place.cache} (once, about 5 seconds)".partition(":")[0],
    ]


def test_a_wheel_without_a_compiler(no_compiler, tmp_path):
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler"):
        build.compile_for_wheel(tmp_path, [])


# only in a folder that no other user can write to


def test_a_home_that_cannot_be_written_to(place, no_home):
    folder = place.temporary / f"wbdit-{os.geteuid()}"
    assert build.build().parent == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert _answer(build.build()) == 42
    assert place.n_calls() == 2
    folder.chmod(0o777)
    with pytest.raises(build.BuildError, match="WBDIT_CACHE"):
        build.build()


def test_a_link_in_the_shared_folder_is_refused(place, no_home):
    (place.temporary / "elsewhere").mkdir(mode=0o700)
    (place.temporary / f"wbdit-{os.geteuid()}").symlink_to(place.temporary / "elsewhere")
    with pytest.raises(build.BuildError, match="WBDIT_CACHE"):
        build.build()


def test_no_folder_at_all(place, no_home, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(place.cache.parent / "file"))
    with pytest.raises(build.BuildError, match=r"cannot write to .*file/wbdit.*set WBDIT_CACHE"):
        build.build()


def test_a_folder_others_can_write_to_is_refused(place):
    library = build.build()
    library.write_bytes(b"anything")
    place.cache.chmod(0o777)
    with pytest.raises(build.BuildError, match="others can write to it"):
        build.build()
    assert build.status().startswith("not built yet")


def test_a_folder_of_another_user_is_refused(place, monkeypatch):
    place.cache.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(place.cache, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(build.BuildError, match="another user"):
        build.build()
    assert place.n_calls() == 0


def test_a_library_others_can_write_to_is_not_loaded(place):
    library = build.build()
    library.write_bytes(b"anything")
    library.chmod(0o666)
    assert _answer(build.build()) == 42


# failures


def test_no_compiler(no_compiler, monkeypatch):
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(build.available())) for _ in range(8)]

    def run():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with pytest.warns(RuntimeWarning, match=r"slower PyTorch reference: no C\+\+ compiler.*install g\+\+") as caught:
        run()
    assert answers == [False] * 8
    assert len(caught) == 1
    monkeypatch.setenv("CXX", COMPILER)  # no effect: the failure is remembered
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not build.available()
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.load()
    assert build.status().startswith("not in use, no C++ compiler")


def test_no_compiler_but_a_library(place, request):
    library = build.build()
    request.getfixturevalue("no_compiler")
    assert build.build() == library
    assert build.status() == f"compiled here, {library}"
    place.write("answer.cpp", ANSWER % 43)
    assert build.status().startswith("cannot be built, no C++ compiler")


def test_a_compile_error(place):
    place.write("wrong.cpp", "int f() { return missing; }\n")
    with pytest.raises(build.BuildError, match=r"wrong\.cpp:1:\d+: error: .*missing") as caught:
        build.build()
    assert "\n" not in str(caught.value)
    assert [path.name for path in place.cache.iterdir()] == ["lock"]
    with pytest.warns(RuntimeWarning, match="missing"):
        assert not build.available()


def test_a_link_error(place, monkeypatch):
    monkeypatch.setenv("WBDIT_CXXFLAGS", "-lwbdit_has_no_such_library")
    with pytest.raises(build.BuildError, match="wbdit_has_no_such_library"):
        build.build()
    assert [path.name for path in place.cache.iterdir()] == ["lock"]


def test_a_library_with_a_name_left_open(place):
    place.write("answer.cpp", 'int missing();\nextern "C" int answer() { return missing(); }\n')
    with pytest.warns(RuntimeWarning, match="cannot load .*missing"):
        assert not build.available()


def test_a_broken_library(place):
    build.build().write_bytes(b"not a library")
    with pytest.warns(RuntimeWarning, match="cannot load .*: delete it"):
        assert not build.available()


def test_a_variable_that_cannot_be_read(place, monkeypatch):
    monkeypatch.setenv("WBDIT_CXXFLAGS", "-DWORD='")
    with pytest.raises(build.BuildError, match="WBDIT_CXXFLAGS"):
        build.build()
    assert "WBDIT_CXXFLAGS" in build.status()


def test_a_killed_build_leaves_nothing_to_load(place):
    place.compile_with(
        'case "$*" in *-shared*) while [ "$1" != -o ]; do shift; done; echo half >"$2"; kill -9 $PPID; exit 1;; esac'
    )
    process = place.process("build.load()")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (leftover,) = place.cache.glob(".building-*")
    assert (leftover / "library").read_text() == "half\n"
    assert place.libraries() == set()
    assert build.status().startswith("not built yet")

    place.compile_with()
    os.utime(leftover, (0, 0))
    assert _answer(build.build()) == 42
    assert not leftover.exists()


# the source folder, the command


def test_the_sources_are_found(tmp_path, monkeypatch):
    assert build.source_dir() == ROOT / "csrc"
    (tmp_path / "wbdit" / "csrc").mkdir(parents=True)
    (tmp_path / "csrc").mkdir()  # of another package
    monkeypatch.setattr(build, "__file__", str(tmp_path / "wbdit" / "ops" / "build.py"))
    assert build.source_dir() == tmp_path.resolve() / "wbdit" / "csrc"
    monkeypatch.setattr(build, "__file__", str(tmp_path / "other" / "wbdit" / "ops" / "build.py"))
    with pytest.raises(build.BuildError, match="install wbdit again"):
        build.source_dir()


def test_the_command(place, capfd):
    for said in ("compiling", ""):
        with pytest.raises(SystemExit) as exit_:
            cli.run(["build"])
        out, err = capfd.readouterr()
        assert exit_.value.code == 0
        assert {Path(out.strip())} == place.libraries()
        assert said in err
        assert bool(said) == bool(err)
    place.write("wrong.cpp", "wrong\n")
    with pytest.raises(SystemExit) as exit_:
        cli.run(["build"])
    out, err = capfd.readouterr()
    assert exit_.value.code == 2
    assert out == ""
    assert "wbdit: " in err.splitlines()[-1]
    assert "wrong.cpp:1:" in err.splitlines()[-1]
