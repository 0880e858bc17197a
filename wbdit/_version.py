"""The installed version of wbdit and its dependencies."""

from importlib.metadata import PackageNotFoundError, version

MISSING = "not installed"


def installed_version(package: str) -> str:
    """Return the version of an installed package, or :data:`MISSING`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return MISSING


__version__ = installed_version("wbdit")
