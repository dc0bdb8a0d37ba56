"""The command line: `citi`, and `python -m citi`.

Each command has a file of its own and imports what it needs when it runs, torch and transformers
among it: they take seconds, a page of help none.
"""

from __future__ import annotations

import warnings
from typing import Annotated

import typer
from wrapt import register_post_import_hook

from citi.command_line import (
    bench,
    chat,
    data,
    demo,
    doctor,
    evaluate,
    export,
    importance,
    init,
    report,
    train,
    verify,
)
from citi.command_line.failures import GuardedGroup, set_debug

__all__ = ["app", "main"]

app = typer.Typer(
    cls=GuardedGroup,
    name="citi",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(no_args_is_help=True)


@app.callback()
def _settings(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of every error.")
    ] = False,
) -> None:
    """Tool use for a language model without making it worse at everything else (CITI)."""
    set_debug(context, debug)
    if not debug:
        _quiet_libraries()


def _quiet_libraries() -> None:
    """Leave the terminal to our own bars: no loading bars, no deprecations that are not ours."""
    register_post_import_hook(
        lambda logging: logging.disable_progress_bar(), "transformers.utils.logging"
    )
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")


app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)
app.command("bench")(bench.bench)
app.command("init")(init.init)
app.add_typer(data_app, name="data", help="Look at training data.")
data_app.command("check")(data.check)
app.command("importance")(importance.importance)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("chat")(chat.chat)
app.command("report")(report.report)
app.command("export")(export.export)
app.command("verify")(verify.verify)


def main() -> None:
    """Entry point of the `citi` script."""
    # Deprecations between two of our dependencies are nothing that a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(peft|transformers)\b")
    app()
