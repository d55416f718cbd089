"""The console script, and `python -m nativesd`: Ctrl-C ends it quietly from its first import on."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; its code is what the process ends with, 130 after Ctrl-C."""
    try:
        from nativesd.cli import run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
