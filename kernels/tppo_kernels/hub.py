"""Writes this package as a local kernel of Hugging Face ``kernels`` (0.17).

python -m tppo_kernels.hub DESTINATION

from kernels import get_local_kernel
tk = get_local_kernel(Path("DESTINATION").resolve())
logp, entropy = tk.logprobs_from_logits(logits, targets)
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

VERSION = 1


def write(destination: Path) -> Path:
    """Copy the package to ``destination``/build/torch-universal and describe it; returns ``destination``.

    The compiled CPU library is this machine's own and stays behind: a CPU takes the reference there.

    Raises:
        FileExistsError: there is a build already.
    """
    build = destination / "build" / "torch-universal"
    shutil.copytree(
        Path(__file__).parent, build, ignore=shutil.ignore_patterns("__pycache__", "hub.py", "libtppo_native.*")
    )
    metadata = {
        "name": "tppo-kernels",
        "id": f"_tppo_kernels_{VERSION}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},  # one must be named; a universal build is loaded on every other, too
    }
    (build / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    return destination


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tppo_kernels.hub DESTINATION")
    print(write(Path(sys.argv[1])))
