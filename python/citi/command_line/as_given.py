"""The command line that a command was started with, for messages and records."""

from __future__ import annotations

import shlex

import typer


def command_as_given(context: typer.Context) -> str:
    """The command, options with their default left out."""
    words = ["citi", str(context.command.name)]
    for parameter in context.command.params:
        value = context.params.get(parameter.name)
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if parameter.param_type_name == "argument":
            words += [str(one) for one in values if one is not None]
        elif value is True:
            words.append(parameter.opts[0])
        elif value is not None and str(value) != str(parameter.default):
            words += [word for one in values for word in (parameter.opts[0], str(one))]
    return shlex.join(words)
