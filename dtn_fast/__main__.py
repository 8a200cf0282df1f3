"""``python -m dtn_fast`` is ``dtn-fast``."""

from dtn_fast.cli.main import main

main()
