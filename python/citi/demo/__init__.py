"""The demo: the whole method on a real small model and real data, beside plain LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from citi.demo.model import demo_model_directory
from citi.observer import RunObserver
from citi.recipe import Recipe
from citi.run_directory import RunDirectory

DATA = Path(__file__).parent / "data"
GENERAL = ("math", "code", "knowledge", "instruct")


@dataclass(frozen=True)
class DemoSize:
    """How much of everything: what a laptop does in the time that the demo promises.

    Attributes:
        tool_samples, general_samples: training samples of tool calls, and of each general ability.
        importance_samples: samples of each ability that importance looks at.
        eval_samples: held-out samples of each set.
        epochs_rp, epochs_mi, epochs_uco: passes over the mix in the three stages.
    """

    tool_samples: int
    general_samples: int
    importance_samples: int
    eval_samples: int
    epochs_rp: float
    epochs_mi: float
    epochs_uco: float


FULL = DemoSize(64, 16, 8, 32, 0.5, 2.0, 0.5)
QUICK = DemoSize(16, 4, 2, 8, 0.5, 1.0, 0.5)


def demo_recipe(*, quick: bool, output: Path) -> Recipe:
    """The demo as a recipe; the model is converted on the first call.

    The paper's settings belong to an 8B model and 20,000 samples. Here a 135M model sees 128 of
    them: the learning rates and alpha are higher, so that it learns within a hundred steps.
    """
    size = QUICK if quick else FULL
    return Recipe(
        model=str(demo_model_directory()),
        tool={"api_bank": str(DATA / "tool_train.jsonl.gz")},
        general={name: str(DATA / f"{name}_train.jsonl.gz") for name in GENERAL},
        eval_tool={level: str(DATA / f"tool_eval_{level}.jsonl.gz") for level in ("lv1", "lv3")},
        eval_general={name: str(DATA / f"{name}_eval.jsonl.gz") for name in GENERAL},
        output=str(output.resolve()),
        importance_samples=size.importance_samples,
        tool_samples=size.tool_samples,
        general_samples=size.general_samples,
        eval_samples=size.eval_samples,
        judged_samples=0,
        lora_alpha=16.0,
        learning_rate=1e-3,
        uco_learning_rate=1e-4,
        epochs_rp=size.epochs_rp,
        epochs_mi=size.epochs_mi,
        epochs_uco=size.epochs_uco,
        max_length=512,
        batch_size=1,  # short general samples would else be padded to the length of tool samples
        gradient_accumulation=4,
        max_new_tokens=64,
        eval_batch_size=16,
        save_steps=20,
    )


def run_demo(
    *, quick: bool = False, output: str | Path = "runs/demo", observer: RunObserver | None = None
) -> RunDirectory:
    """Run CITI, then plain LoRA on the tool data alone, and put both into one report.

    Run again with the same output, it goes on where it stopped.

    Args:
        quick: Less data: a few minutes, weaker numbers.
        output: The run directory.
        observer: Told of phases and progress.
    Returns:
        The run directory, with eval/base.json, eval/tuned.json (CITI), eval/lora.json, report.html.
    Raises:
        ImportError: The model's package, or what reads it, is missing; the message says how to
            install it. Without matplotlib a line says that there is no report.
        RunError: The folder holds another run.
    """
    from citi.baseline import compare_with_lora
    from citi.report import build_report
    from citi.run import train

    observer = observer or RunObserver()
    observer.line("SmolLM2-135M-Instruct, API-Bank tool calls, four general abilities")
    recipe = demo_recipe(quick=quick, output=Path(output))
    run = train(recipe, observer=observer)
    compare_with_lora(recipe, learning_rate=5e-4, observer=observer)
    try:  # every time: `train` wrote it without LoRA, and a kill may have come in between
        build_report(run.path)
    except ImportError as error:
        observer.line(f"no report: {error}; afterwards: citi report {run.path}")
    return run
