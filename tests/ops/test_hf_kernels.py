"""The package as a local kernel of Hugging Face ``kernels``, loaded by the real package beside the installed one."""

from __future__ import annotations

import pytest
import torch
import tppo_kernels as tk
from tppo_kernels import hub
from tppo_kernels.testing import random_logits, random_ppo

hf = pytest.importorskip("kernels", reason="Hugging Face kernels is not installed")
if not hasattr(hf, "get_local_kernel"):
    pytest.skip("this `kernels` is not Hugging Face's", allow_module_level=True)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return hf.get_local_kernel(hub.write(tmp_path_factory.mktemp("hub") / "tppo-kernels").resolve())


def test_it_is_another_copy_with_the_same_surface(loaded):
    assert loaded.__name__ != tk.__name__
    assert loaded.__all__ == tk.__all__
    assert loaded.logprobs_from_logits is not tk.logprobs_from_logits


def test_its_ops_compute_and_differentiate(loaded):
    logits, targets = random_logits(4, 33)
    x = random_ppo(4)
    grads = []
    for copy in (loaded, tk):
        leaf = logits.clone().requires_grad_()
        choice = {} if copy is loaded else {"backend": "reference"}  # the compiled library belongs to one machine
        logp, entropy = copy.logprobs_from_logits(leaf, targets, **choice)
        loss, _ = copy.ppo_loss(logp, x["old_logp"], x["advantages"], entropy=entropy, entropy_coef=0.1, **choice)
        loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_a_build_is_never_overwritten(tmp_path):
    hub.write(tmp_path / "once")
    with pytest.raises(FileExistsError):
        hub.write(tmp_path / "once")
