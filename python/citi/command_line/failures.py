"""What the user sees when something goes wrong: one line, the way out, an exit code.

0 done; 1 the input or this machine cannot do it; 2 wrong usage; 130 interrupted. Anything else that
is raised is a mistake of ours and keeps its traceback.
"""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

FAILED, INTERRUPTED = 1, 130
_USER_ERRORS = (ValueError, OSError, ImportError)
_DEBUG_HINT = "citi --debug … shows where it came from"
_DEBUG, _RESUME, _LESS_MEMORY = "citi.debug", "citi.resume", "citi.less_memory"
_RECIPE_MEMORY = (
    "lower batch_size (and raise gradient_accumulation), lower max_length, or set"
    " gradient_checkpointing=true"
)


def set_debug(context: typer.Context, debug: bool) -> None:
    """Show the traceback of users' errors too."""
    context.meta[_DEBUG] = debug


def set_resume(context: typer.Context, command: str) -> None:
    """Register the command line that carries on where an interrupted `context` command stops."""
    context.meta[_RESUME] = command


def set_less_memory(context: typer.Context, advice: str) -> None:
    """Register what `context`'s command should be told when memory runs out."""
    context.meta[_LESS_MEMORY] = advice


class GuardedGroup(TyperGroup):
    """A command group whose commands end with a message and an exit code, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; see the module for what becomes of exceptions."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            _say(f"\ninterrupted. {_way_on(ctx)}", colour=None)
            raise typer.Exit(INTERRUPTED) from interrupt
        except BrokenPipeError:
            raise
        except _USER_ERRORS as error:
            if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("citi"):
                raise
            _fail(ctx, str(error) or type(error).__name__, error)
        except Exception as error:
            advice = ctx.meta.get(_LESS_MEMORY, _RECIPE_MEMORY)
            message = _known_machine_limit(error, advice)
            if message is None:
                raise
            _fail(ctx, message, error)


def _way_on(ctx: Any) -> str:
    resume = ctx.meta.get(_RESUME)
    return f"To resume: {resume}" if resume else "Run the same command again."


def _fail(ctx: Any, message: str, error: Exception) -> None:
    if ctx.meta.get(_DEBUG):
        raise error
    _say(f"error: {message}", colour=typer.colors.RED)
    hint = "citi doctor shows what is missing" if isinstance(error, ImportError) else _DEBUG_HINT
    _say(f"({hint})", colour=None)
    raise typer.Exit(FAILED) from error


def _say(text: str, *, colour: str | None) -> None:
    typer.secho(text, err=True, fg=colour)


def _known_machine_limit(error: Exception, less_memory: str) -> str | None:
    """A message for errors that are neither the user's values nor our mistake; None for the rest.

    torch is looked up, not imported: without it there cannot be an error of its.
    """
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        details = str(error).splitlines()[0] if str(error) else "no details"
        return f"out of memory ({details}); {less_memory}"
    if isinstance(error, RuntimeError) and str(error).startswith("backend "):
        return str(error)
    return None
