"""What `import citi` and the command line load, and when PEFT learns of `molora`."""

from __future__ import annotations

import subprocess
import sys

import pytest

SLOW = ("torch", "transformers", "peft", "numpy")
WHAT_IS_LOADED = f"import sys; print([name for name in {SLOW} if name in sys.modules])"


def _python(code: str, *, exit_code: int = 0) -> str:
    """The last line that `code` prints, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == exit_code, result.stderr
    return result.stdout.splitlines()[-1]


def test_import_citi_loads_nothing_slow_until_it_is_needed() -> None:
    assert _python(f"import citi; {WHAT_IS_LOADED}") == "[]"
    assert _python(f"import citi; citi.MoLoraConfig; {WHAT_IS_LOADED}") == str(list(SLOW))


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [("--help", 0), ("train --help", 0), ("trian", 2), ("init", 2), ("train nowhere.yaml", 1)],
)
def test_help_and_wrong_usage_load_nothing_slow(words: str, exit_code: int) -> None:
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: exec({WHAT_IS_LOADED!r}))\n"
        "from citi.command_line import app\n"
        f"app({words.split()})"
    )
    assert _python(code, exit_code=exit_code) == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import citi; from peft import get_peft_config",
        "from peft import get_peft_config; import citi",
        "import citi; from transformers import Trainer; from peft import get_peft_config",
    ],
)
def test_peft_knows_molora_whichever_is_imported_first(imports: str) -> None:
    code = f"{imports}\nprint(type(get_peft_config({{'peft_type': 'MOLORA', 'r': 3}})).__name__)"
    assert _python(code) == "MoLoraConfig"
