"""What all scripts do with their flags."""

import sys
from typing import NoReturn


def fail(message: str) -> NoReturn:
    """End the program for a user's mistake: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
