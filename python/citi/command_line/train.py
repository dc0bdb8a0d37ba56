"""`citi train`: a whole run from a recipe, or the rest of one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from citi.command_line.failures import set_resume


def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML); see citi init.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe keys to change.")
    ] = None,
) -> None:
    """Importance, plan, the three stages, evaluation, report. Run it again to resume.

    Several GPUs or machines: accelerate launch -m citi train recipe.yaml
    """
    set_resume(context, shlex.join(["citi", "train", str(recipe), *(overrides or ())]))
    from citi.recipe import load_recipe

    settings = load_recipe(recipe, overrides or ())  # a mistake in it is told before torch loads

    from citi.command_line.comparison import print_comparison, print_path
    from citi.command_line.progress import Watcher
    from citi.processes import this_process
    from citi.run import train as run_recipe

    console = Console(quiet=not this_process().is_main_process)
    with Watcher(console) as watcher:
        run = run_recipe(settings, observer=watcher)
    print_comparison(console, run)
    print_path(console, "run", run.path)
