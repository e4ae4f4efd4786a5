"""What is particular to the compiled backend: instruction sets, threads, bad targets, and a package without it."""

from __future__ import annotations

import _ctypes
import functools
import subprocess
import sys

import pytest
import torch
import tppo_kernels as tk
from tppo_kernels import backend as backends
from tppo_kernels import native
from tppo_kernels.testing import assert_close, random_logits, random_ppo, random_rollouts

needs_native = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


def everything(backend, dtype=torch.float32):
    """Each op once, on enough for a thread team: outputs and gradients."""
    logits, targets = random_logits(220, 5003, dtype)
    logits.requires_grad_()
    logp, entropy = tk.logprobs_from_logits(logits, targets, softcap=20.0, backend=backend)
    (logp - 0.1 * entropy).sum().backward()
    x = random_ppo(70_000, dtype=dtype)
    x["logp"].requires_grad_()
    loss, metrics = tk.ppo_loss(**x, kl_coef=0.1, entropy_coef=0.1, dual_clip=2.0, backend=backend)
    loss.backward()
    rollouts = {k: t.to(dtype) if t.is_floating_point() else t for k, t in random_rollouts([60] * 2300).items()}
    scans = tk.gae(**rollouts, return_stats=True, backend=backend)
    return [logp, entropy, logits.grad, loss, *metrics.values(), x["logp"].grad, *scans]


reference_of = functools.cache(functools.partial(everything, "reference"))


@needs_native
@pytest.mark.parametrize("simd", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(simd):
    before = native.simd()
    try:
        native.select_simd(simd)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        assert native.simd() == simd
        assert_close(everything("native"), reference_of(torch.float32), reference_of(torch.float64))
    finally:
        native.select_simd(before)


@needs_native
def test_the_thread_count_changes_no_bit():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(everything("native"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
@pytest.mark.parametrize("target", [-1, 7])
def test_a_target_outside_of_the_vocabulary_is_named(target):
    with pytest.raises(IndexError, match=f"target {target} is outside of the vocabulary of 7: give ids"):
        tk.logprobs_from_logits(torch.zeros(2, 7), torch.tensor([0, target]), backend="native")


@pytest.mark.parametrize("name", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("cu_seqlens", [[0], [0, 1], [0, 3], [1, 2], [0, 3, 2]], ids=str)
def test_segments_that_do_not_cover_the_actions_are_named(cu_seqlens, name):
    with pytest.raises(ValueError, match="must rise from 0 to the 2 actions"):
        tk.gae(torch.zeros(2), torch.zeros(2), torch.tensor(cu_seqlens), backend=name)


def test_whiten_differentiates_through_its_statistics():
    x = random_ppo(20, dtype=torch.float64)["advantages"].requires_grad_()
    assert torch.autograd.gradcheck(tk.whiten, x)


@needs_native
def test_instruction_set_that_does_not_exist():
    with pytest.raises(ValueError, match="'sse9' is not available"):
        native.select_simd("sse9")


def test_backend_by_argument_environment_and_device(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    assert backends.choose(None, "cpu") == ("reference" if native.missing() else "native")
    assert backends.choose("reference", "cpu") == "reference"
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    assert backends.choose(None, "cpu") == "reference"
    monkeypatch.setenv(backends.ENVIRONMENT, "cublas")
    with pytest.raises(ValueError, match="unknown backend 'cublas': choose one of reference, native"):
        tk.whiten(torch.zeros(2))
    assert backends.choose("reference", "cpu") == "reference"
    with pytest.raises(ValueError, match="'triton' runs on a GPU and the tensors are on the CPU"):
        tk.whiten(torch.zeros(2), backend="triton")
    with pytest.raises(ValueError, match="'native' runs on the CPU and the tensors are on cuda"):
        backends.choose("native", "cuda")


WITHOUT = """
import pathlib, shutil, sys
import tppo_kernels
home = pathlib.Path(sys.argv[1])
shutil.copytree(pathlib.Path(tppo_kernels.__file__).parent, home / "pure", ignore=shutil.ignore_patterns("libtppo*"))
shutil.copytree(home / "pure", home / "broken")
shutil.copytree(home / "pure", home / "foreign")
(home / "broken" / "libtppo_native.so").write_bytes(b"not a library")
shutil.copy(sys.argv[2], home / "foreign" / "libtppo_native.so")
sys.path.insert(0, str(home))
import torch, pure as tk
from pure import backend
assert backend.choose(None, "cpu") == "reference"
assert tk.whiten(torch.tensor([1.0, 3.0])).tolist()[0] < 0
try:
    tk.whiten(torch.zeros(2), backend="native")
except ValueError as error:
    print(error)
import broken.native, foreign.native
print(broken.native.missing())
print(foreign.native.missing())
"""


def test_a_package_without_the_library_works_and_says_what_is_lost(tmp_path):
    command = [sys.executable, "-c", WITHOUT, tmp_path, _ctypes.__file__]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    unbuilt, broken, foreign = run.stdout.splitlines()
    assert "not built: run `make native`" in unbuilt
    assert "do not load" in broken
    assert "do not load" in foreign
    assert "tppo_abi_version" in foreign
