"""Command line ``dtn-fast`` as ``python -m dtn_fast``."""

from dtn_fast.cli.main import main

main()
