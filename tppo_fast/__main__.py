"""``python -m tppo_fast``: the ``tppo-fast`` command."""

from tppo_fast.cli import main

main()
