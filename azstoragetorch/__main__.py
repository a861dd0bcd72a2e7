"""``python -m azstoragetorch``: the command line without its entry point."""

from __future__ import annotations

from azstoragetorch.cli import main

main()
