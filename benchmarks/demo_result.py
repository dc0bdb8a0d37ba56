"""Keep a finished demo's numbers: `python benchmarks/demo_result.py runs/demo OUT.json`.

What ran on what, the seconds of each phase, and every measured figure; the generated answers and
the machine's paths stay behind.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from citi.report import read_results


def demo_record(run: Path) -> dict[str, object]:
    """The record of a run directory that `citi demo` finished."""
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    results = read_results(run / "eval")
    return {
        "machine": json.loads((run / "env.json").read_text(encoding="utf-8")),
        "started": manifest["started"],
        "seconds": {
            name: facts["seconds"]
            for name, facts in manifest["phases"].items()
            if "seconds" in facts
        },
        "results": {
            name: {"tool": result.tool, "general": result.general}
            for name, result in results.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory of a demo")
    parser.add_argument("target", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    text = json.dumps(demo_record(arguments.run), indent=2)
    arguments.target.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
