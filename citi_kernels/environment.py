"""The one place that reads environment variables, once, when the package is imported.

CITI_BACKEND  name of the backend every op must use (see `citi_kernels.backends`); empty: no choice.
"""

from __future__ import annotations

import os

BACKEND: str | None = os.environ.get("CITI_BACKEND") or None
