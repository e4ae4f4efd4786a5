"""``python -m tppo_fast``: the ``tppo-fast`` command."""

import sys


def main() -> None:
    """Entry point of the ``tppo-fast`` command: a Ctrl-C while its parts are still loading is no traceback either."""
    try:
        from tppo_fast.cli import cli, run

        sys.exit(run(lambda: cli(standalone_mode=False)))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
