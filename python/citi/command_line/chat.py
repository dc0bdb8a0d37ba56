"""`citi chat`: talk to the model of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def chat(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    system: Annotated[str | None, typer.Option("--system", help="System text.")] = None,
    tools: Annotated[
        Path | None, typer.Option("--tools", help="JSON list of tools the model may call.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="The base model, without adapter.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
) -> None:
    """Line by line, with streamed answers. Tool calls are shown, never run."""
    import contextlib

    from citi.chat import ChatSession, read_tools
    from citi.run import load_run

    described = read_tools(tools) if tools is not None else ()
    console = Console(stderr=True)
    with console.status("loading the model") if console.is_terminal else contextlib.nullcontext():
        model, tokenizer = load_run(run)
    session = ChatSession(
        model, tokenizer, system=system, tools=described, max_new_tokens=max_new_tokens
    )
    with model.disable_adapter() if base else contextlib.nullcontext():
        session.run()
