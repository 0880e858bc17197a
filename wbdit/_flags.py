"""Command line flags in place of the argument names in messages."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from typing import Any

import click

from wbdit.errors import InputError

QUOTES = "\"'"
ARGUMENT = re.compile(r"`(\w+)(?:=([^`]+))?`")


def with_flags(message: str, commands: Iterable[click.Command]) -> str:
    """Replace each argument in backquotes by the flag of the first command that has it.

    An option's parameter name must be the name of the Python argument. Backquotes around anything else are left alone.

    Examples
    --------
    >>> from wbdit._flags import with_flags
    >>> from wbdit.cli import cli
    >>> with_flags('give `max_genes`, or `precision="fp32"`, or `resume=True`, or `mix`', cli.commands.values())
    'give --max-genes, or --precision fp32, or --resume, or --mix'
    """
    parameters = [parameter for command in commands for parameter in command.params]
    flags = {parameter.name: parameter.opts[0] for parameter in reversed(parameters) if parameter.opts[0][0] == "-"}

    def flag(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name not in flags:
            return found[0]
        if value in (None, "True"):
            return flags[name]
        return f"{flags[name]} {shlex.quote(value.strip(QUOTES))}"

    return ARGUMENT.sub(flag, message)


class Group(click.Group):
    """A group of commands whose errors name flags."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an InputError names flags in place of Python's arguments."""
        try:
            return super().invoke(ctx)
        except InputError as error:
            own = self.commands.get(ctx.invoked_subcommand or "")
            error.args = (with_flags(str(error), [*([own] if own else []), *self.commands.values()]),)
            raise
