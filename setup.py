"""With ``WBDIT_PREBUILT=1`` the wheel holds the compiled CPU kernels, otherwise only their sources. See ``make wheel``.

The kernels use PyTorch's stable ABI and no Python headers, so one wheel per platform serves all Python versions.
"""

import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

# Parts of the C++ and C libraries that came after glibc 2.28 and GCC 8. They are compiled into the kernels, so that the
# library loads wherever PyTorch's own wheels do (manylinux_2_28), whatever the compiler. auditwheel checks the result.
STREAMS = """
#include <sstream>
template class std::basic_stringbuf<char>;
template class std::basic_stringstream<char>;
template class std::basic_ostringstream<char>;
"""
# glibc's flag that a process has one thread, which lets shared pointers skip atomic operations: always off
THREADS = """
extern "C" {
extern __attribute__((visibility("hidden"))) const char __libc_single_threaded = 0;
}
"""


class PlatformDistribution(Distribution):
    """A distribution whose wheel is not pure Python."""

    def has_ext_modules(self):
        """Return True, which makes the build folder and the wheel those of one platform."""
        return True


class BuildWithKernels(build_py):
    """Copy the package, then compile the CPU kernels into it."""

    def run(self):
        """Run the command."""
        super().run()
        sys.path.insert(0, str(Path(__file__).parent))
        from wbdit.ops import build

        print(build.compile_for_wheel(Path(self.build_lib, "wbdit", "csrc"), (STREAMS, THREADS)))


class AnyPythonWheel(bdist_wheel):
    """A wheel for one platform and every Python 3."""

    def get_tag(self):
        """Return the tags of the interpreter, its ABI and the platform."""
        return "py3", "none", super().get_tag()[2]


if os.environ.get("WBDIT_PREBUILT"):
    commands = {"build_py": BuildWithKernels, "bdist_wheel": AnyPythonWheel}
    setup(distclass=PlatformDistribution, cmdclass=commands)
else:
    setup()
