"""Command line ``dtn-fast``, also as ``python -m dtn_fast``."""

import sys

from dtn_fast.errors import UsageError
from dtn_fast.packages import require


def main() -> None:
    """Runs the command line, or names in one line the extra that installs it."""
    try:
        for module in ("rich", "tyro"):
            require(module)
    except UsageError as error:
        print(f"dtn-fast: error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    from dtn_fast.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
