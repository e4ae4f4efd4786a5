"""What is compiled, that it computes the same, and that the number of graphs does not grow with the number of lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import actor_critic, random_rollouts
from test_attention_varlen import Plain

from tppo_fast import attention, attention_varlen, packing
from tppo_fast.compiling import compile_layers


def batch_of(length: int, prompts: int = 1) -> packing.RolloutBatch:
    rollouts = random_rollouts([(length, 5)] * prompts, n=2)
    batch = packing.pack(rollouts, [r.logprobs for r in rollouts], share_prompts=True)
    return packing.select(batch, range(len(rollouts)))[0]


@pytest.fixture(autouse=True)
def _forget() -> Any:
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's tracer looks at it itself
@pytest.mark.parametrize("flash", [False, True], ids=["sdpa", "flash"])
def test_the_same_graphs_for_every_number_of_tokens(flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that counts stands in for the C++ and Triton ones: what is asked is how often torch would compile.

    With the flash kernels a layer is one graph, attention in it as one op, however many prompts there are; SDPA follows each
    batch's own blocks and parts it.
    """
    if flash:
        monkeypatch.setattr(attention, "can_use_flash", lambda *_: None)
        monkeypatch.setattr(attention_varlen, "best_kernel", Plain)
    graphs: list[Any] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        del inputs
        graphs.append(graph)
        return graph.forward

    plain, compiled = actor_critic(), actor_critic()
    assert compile_layers([compiled.actor.lm, None], backend=counting) == 2
    made = []
    for length, prompts in ((9, 3), (30, 2), (14, 1), (21, 4), (3, 2), (44, 1)):
        batch = batch_of(length, prompts)
        expected, found = (m(batch, temperature=1.0) for m in (plain, compiled))
        torch.testing.assert_close(found.logprobs, expected.logprobs)
        found.logprobs.sum().backward()
        expected.logprobs.sum().backward()
        with torch.no_grad():
            compiled(batch, temperature=1.0)
        made.append(len(graphs))
    assert made[0] == made[-1]
    assert made[0] == 2 if flash else made[0] <= 12  # with gradients and without
    for a, b in zip(plain.actor.parameters(), compiled.actor.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert plain.actor.lm.state_dict().keys() == compiled.actor.lm.state_dict().keys()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_layer_keeps_results_of_gemms_and_attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth less than by the compiler's own choice; attention is not computed again; the gradients are those of eager."""
    kernel = Plain()
    monkeypatch.setattr(attention, "can_use_flash", lambda *_: None)
    monkeypatch.setattr(attention_varlen, "best_kernel", lambda: kernel)
    batch = batch_of(30, 3)
    kept, calls, gradients = [], [], []
    for own_choice in (None, True, False):
        model = actor_critic()
        if own_choice:
            for layer in model.actor.lm.model.layers:
                layer.compile(dynamic=True, backend="aot_eager_decomp_partition")
        elif own_choice is False:
            compile_layers([model.actor.lm], backend="aot_eager_decomp_partition")
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:  # noqa: B023
                saved[storage.data_ptr()] = storage.nbytes()  # noqa: B023
            held.append(tensor)  # noqa: B023
            return tensor

        held: list[torch.Tensor] = []  # so that no address is used twice
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            hidden = model.actor.hidden(batch)
        kernel.calls.clear()
        hidden.sin().sum().backward()
        kept.append(sum(saved.values()))
        calls.append(len(kernel.calls))
        gradients.append([p.grad for p in model.actor.parameters() if p.grad is not None])
        torch.compiler.reset()
    assert kept[2] < 0.8 * kept[1] < 0.8 * kept[0]
    assert calls[0] == calls[2]
    for a, b in zip(gradients[0], gradients[2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
