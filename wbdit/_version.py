"""The installed version."""

from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str:
    """Return a package's version, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


__version__ = installed_version("wbdit")
