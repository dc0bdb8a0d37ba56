"""`citi init`: a fresh recipe with every key, its default and what it means."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Annotated

import typer


def init(
    recipe: Annotated[Path, typer.Argument(help="YAML file to write.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Hub name or directory.")],
    tool: Annotated[list[Path], typer.Option("--tool", help="Tool-call data; may be repeated.")],
    general: Annotated[
        list[Path], typer.Option("--general", help="General data, one file an ability; repeat.")
    ],
    eval_tool: Annotated[
        list[Path] | None, typer.Option("--eval-tool", help="Held-out tool-call data.")
    ] = None,
    eval_general: Annotated[
        list[Path] | None, typer.Option("--eval-general", help="Held-out general data; repeat.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a recipe: every key with its default and a comment.

    Data paths are checked, and written relative to the recipe's folder.
    """
    from citi.durable import write_text
    from citi.recipe import template

    if recipe.exists() and not force:
        raise FileExistsError(f"{recipe} exists; choose another name, or --force to replace it")
    data = {
        "tool": tool,
        "general": general,
        "eval_tool": eval_tool or [],
        "eval_general": eval_general or [],
    }
    for file in itertools.chain.from_iterable(data.values()):
        if not file.is_file():
            raise FileNotFoundError(f"no such data file: {file}")
    beside = {key: [_beside(recipe, file) for file in files] for key, files in data.items()}
    text = template(
        str(Path(model).resolve()) if Path(model).is_dir() else model,
        output=f"runs/{recipe.stem}",
        **beside,
    )
    write_text(recipe, text)
    typer.echo(f"wrote {recipe}. Next:")
    typer.echo(f"  citi data check {recipe}")
    typer.echo(f"  citi train {recipe}")


def _beside(recipe: Path, file: Path) -> str:
    return os.path.relpath(file.resolve(), recipe.resolve().parent)
