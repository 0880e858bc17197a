"""The one exception for mistakes a user can mend."""


class InputError(ValueError):
    """Bad input: the message is one line and says what to do.

    The command line prints it after ``wbdit:`` on stderr and exits with code 2.
    """


def need_extra(package: str, extra: str = "report") -> InputError:
    """Return the error for an optional package that is not installed."""
    return InputError(f"this needs {package}, which is not installed: pip install 'wbdit[{extra}]'")
