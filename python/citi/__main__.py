"""`python -m citi` is `citi`; `accelerate launch -m citi train ...` starts several processes."""

from __future__ import annotations

from citi.command_line import main

if __name__ == "__main__":
    main()
