"""What is compiled, that it computes the same, and that the number of graphs does not grow with the number of lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import actor_critic, random_rollouts

from tppo_fast import packing
from tppo_fast.compiling import compile_layers


def batch_of(length: int) -> packing.RolloutBatch:
    rollouts = random_rollouts([(length, 5)], n=2)
    return packing.pack(rollouts, [r.logprobs for r in rollouts], share_prompts=True)


@pytest.fixture(autouse=True)
def _forget() -> Any:
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's tracer looks at it itself
def test_one_graph_for_every_number_of_tokens() -> None:
    """A backend that counts stands in for the C++ and Triton ones: what is asked is how often torch would compile."""
    graphs: list[Any] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        del inputs
        graphs.append(graph)
        return graph.forward

    plain, compiled = actor_critic(), actor_critic()
    assert compile_layers([compiled.actor.lm, None], backend=counting) == 2
    made = []
    for length in (9, 30, 14, 21, 3, 44):
        expected, found = (m(batch_of(length), temperature=1.0) for m in (plain, compiled))
        torch.testing.assert_close(found.logprobs, expected.logprobs)
        found.logprobs.sum().backward()
        expected.logprobs.sum().backward()
        with torch.no_grad():
            compiled(batch_of(length), temperature=1.0)
        made.append(len(graphs))
    assert made[0] == made[-1] <= 8  # before, in, and twice after attention, each with gradients and without
    for a, b in zip(plain.actor.parameters(), compiled.actor.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert plain.actor.lm.state_dict().keys() == compiled.actor.lm.state_dict().keys()
