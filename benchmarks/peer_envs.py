"""One environment per peer under ``.peers``, with pinned versions: no clash between dependencies decides a result.

    python -m benchmarks.peer_envs            (every peer that cannot run yet; 1 GB each)
    python -m benchmarks.peer_envs trl-ppo    (this one, made anew)

``peer_pins/NAME.txt`` names the peer and pins everything that its environment holds. A peer that cannot be installed keeps its
reason in its folder, for the tables. Where this very interpreter has the peer in its version (a test environment has TRL
1.12.0), it serves without an environment of its own.

This module imports no torch.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from tppo_fast.atomic import write_atomic

ROOT = Path(__file__).parents[1] / ".peers"
PINS = Path(__file__).parent / "peer_pins"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


def names() -> list[str]:
    return sorted(path.stem for path in PINS.glob("*.txt"))


def peer(name: str) -> str:
    """What the environment is for, such as "trl==1.12.0"."""
    first = (PINS / f"{name}.txt").read_text().splitlines()[0]
    return first.removeprefix("# peer:").strip()


def pins(name: str) -> list[str]:
    lines = (PINS / f"{name}.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def python_of(name: str) -> Path | None:
    """The interpreter that runs the peer, or None; ``missing`` says why."""
    own = ROOT / name / "bin" / "python"
    if _state(name) == "ready":
        return own
    package, _, version = peer(name).partition("==")
    try:
        return Path(sys.executable) if metadata.version(package) == version else None
    except metadata.PackageNotFoundError:
        return None


def missing(name: str) -> str | None:
    """Why the peer cannot run here, in one sentence, or None."""
    if python_of(name):
        return None
    if _state(name).startswith("failed: "):
        return f"{peer(name)} could not be installed: {_state(name).removeprefix('failed: ')}"
    return f"{peer(name)} has no environment here: python -m benchmarks.peer_envs {name}"


def make(name: str) -> str:
    """Make the environment anew; returns "ready", or "failed: " and the reason, which stays in its folder."""
    folder = ROOT / name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        _venv(folder)
        _install(folder, pins(name))
        state = "ready"
    except subprocess.CalledProcessError as error:
        state = f"failed: {_last_line(error)}"
    write_atomic(folder / "state", f"{_digest(name)} {state}\n".encode())
    return state


def _state(name: str) -> str:
    """ "ready", "failed: reason", or "" where nothing was made from these pins."""
    try:
        digest, _, state = (ROOT / name / "state").read_text().strip().partition(" ")
    except OSError:
        return ""
    return state if digest == _digest(name) else ""


def _digest(name: str) -> str:
    return hashlib.sha256("\n".join([platform.python_version(), *pins(name)]).encode()).hexdigest()[:16]


def _venv(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True, text=True)


def _install(folder: Path, requirements: list[str]) -> None:
    """Torch first, in its CPU build where there is no NVIDIA driver; then the rest."""
    torch = [r for r in requirements if r.startswith("torch==")]
    if torch and sys.platform == "linux" and shutil.which("nvidia-smi") is None:
        try:
            _pip(folder, f"{torch[0]}+cpu")
        except subprocess.CalledProcessError:
            _pip(folder, "--extra-index-url", TORCH_INDEX, f"{torch[0]}+cpu")
    else:
        _pip(folder, *torch)
    _pip(folder, *[r for r in requirements if r not in torch])


def _pip(folder: Path, *arguments: str) -> None:
    if arguments:
        command = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *arguments]
        subprocess.run(command, check=True, capture_output=True, text=True)


def _last_line(error: subprocess.CalledProcessError) -> str:
    lines = [line for line in (error.stderr or "").splitlines() if line.startswith("ERROR")]
    return " ".join((lines or [f"{error.cmd[0]} ended with {error.returncode}"])[-1].removeprefix("ERROR:").split())[
        :300
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names())}; none: all that cannot run")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(names())):
        parser.error(f"{unknown[0]!r}: no peer is called that; there are {', '.join(names())}")
    failed = []
    for name in options.names or [n for n in names() if python_of(n) is None]:
        print(f"{name}: installing ...", flush=True)
        state = make(name)
        print(f"{name}: {state}", flush=True)
        failed += [name] if state != "ready" else []
    if failed:
        sys.exit(f"not installed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
