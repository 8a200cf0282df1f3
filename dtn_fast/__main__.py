"""``python -m dtn_fast`` is ``dtn-fast``."""

from dtn_fast.cli import main

main()
