"""The command line: ``azstoragetorch doctor | ls | cp | rm | checkpoint | safetensors | manifest | bench | ...``.

No other module imports this package. Its additional dependencies, click and rich, are the extra ``cli``, and only this
package imports them.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command in ``sys.argv`` and end the process with its exit code."""
    try:
        import click  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        print(  # noqa: T201
            f"azstoragetorch: the command line needs {error.name}, which is not installed: pip install click rich",
            file=sys.stderr,
        )
        sys.exit(2)
    from azstoragetorch.cli._app import run

    sys.exit(run(sys.argv[1:]))
