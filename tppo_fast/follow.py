"""The process of a ``follower.Follower``: ``python -m tppo_fast.follow``, started by ``leader.Leader``."""

from __future__ import annotations

import os
import sys

from tppo_fast.child import Parent


def main() -> None:
    parent = Parent()
    from tppo_fast.cli import quiet_libraries

    quiet_libraries()
    sys.path[:] = parent.told["path"]  # where the leader's plug-ins are
    with parent.connected(2) as (learn, sample):
        from tppo_fast.follower import Follower

        Follower(parent.told).follow(learn, sample)
    os._exit(0)  # the interpreter's own end could hang in a library's threads


if __name__ == "__main__":
    main()
