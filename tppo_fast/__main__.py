"""``python -m tppo_fast``: the ``tppo-fast`` command."""

import sys

from tppo_fast.interrupt import INTERRUPTED, end_as_ctrl_c_does


def main() -> None:
    """Entry point of the ``tppo-fast`` command: a Ctrl-C or SIGTERM while its parts are still loading is no traceback either."""
    try:
        end_as_ctrl_c_does()
        from tppo_fast.cli import cli, run

        sys.exit(run(lambda: cli(standalone_mode=False)))
    except KeyboardInterrupt:
        sys.stderr.write(f"{INTERRUPTED}\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
