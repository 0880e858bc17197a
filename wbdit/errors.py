"""The exception for mistakes that the user can fix."""


class InputError(ValueError):
    """Invalid input; the message is one line and says what to do.

    A message names arguments in backquotes, as in "give `minutes` or `steps`" or "choose `device="cpu"`". The command
    line replaces them by flags, prints the message after ``wbdit:`` on stderr and exits with code 2.

    Examples
    --------
    >>> generator.generate(2, sampler="euler")
    Traceback (most recent call last):
        ...
    wbdit.errors.InputError: unknown `sampler` 'euler': choose one of ddim, ddpm, unipc, dpmpp, sde-dpmpp
    """


class SharedError(InputError):
    """An error that all processes of a training have learned of.

    Parameters
    ----------
    message
        As for an InputError.
    reports
        Whether this process is the one that reports it to the user.

    Examples
    --------
    >>> from wbdit.errors import SharedError
    >>> SharedError("process 1: out of memory", reports=True).reports
    True
    """

    def __init__(self, message: str, reports: bool) -> None:
        super().__init__(message)
        self.reports = reports


def need_extra(package: str, extra: str = "report") -> InputError:
    """Return the error that reports a missing optional package and the extra that installs it."""
    return InputError(f"this needs {package}, which is not installed: pip install 'wbdit[{extra}]'")
