"""Actor, critic and frozen reference from any transformers causal LM, reading packed batches."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tppo_kernels as tk
from torch import Tensor, nn

from tppo_fast import attention, lora
from tppo_fast.config import ModelConfig
from tppo_fast.data_types import LossOutput, RolloutBatch, TrainBatch, TrainRows
from tppo_fast.errors import UserError
from tppo_fast.loading import load_policy

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What the models say of some actions, differentiable, fp32."""

    logprobs: Float[Tensor, "A"]
    entropy: Float[Tensor, "A"]
    values: Float[Tensor, "A"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(Outputs):
    """What the models say of all actions of a batch."""

    final_values: Float[Tensor, "B"]
    """V(state after the last action), for truncated responses."""


class Actor(nn.Module):
    """A causal LM that reads packed batches and reports log-probabilities of actions."""

    def __init__(self, lm: Any, config: ModelConfig) -> None:
        super().__init__()
        self.lm = lm
        self.config = config
        if (
            lm.config._attn_implementation != attention.NAME
        ):  # another one would let the packed sequences see each other
            attention.register()
            lm.set_attn_implementation(attention.NAME)
        head = lm.get_output_embeddings()
        if head is None:
            raise UserError(f"model.path: {type(lm).__name__} has no language-model head; give a causal LM")
        settings = lm.config.get_text_config()
        self.softcap: float | None = getattr(settings, "final_logit_softcapping", None)
        scale = getattr(settings, "logit_scale", None)  # Cohere multiplies, Granite divides
        self.logit_scale = float(scale or 1.0) / float(getattr(settings, "logits_scaling", None) or 1.0)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def body(self) -> nn.Module:
        """The transformer without its head."""
        return self.lm.base_model

    def hidden(self, batch: RolloutBatch, layout: attention.Layout | None = None) -> Float[Tensor, "N D"]:
        """Last hidden states of every packed token. ``layout``: of this batch, where it is at hand."""
        return hidden_states(self.body, batch, self.config, layout)

    def logprobs(
        self, states: Float[Tensor, "A D"], actions: Int[Tensor, "A"], temperature: float
    ) -> tuple[Float[Tensor, "A"], Float[Tensor, "A"]]:
        """Log-probability of each action and entropy of its distribution, fp32."""
        weight, options = self.head(temperature)
        return tk.linear_logprobs(self.operand(states), weight, actions, **options)

    def head(self, temperature: float) -> tuple[Float[Tensor, "V D"], dict[str, Any]]:
        """The head's weight, and what else the head ops need to know of it."""
        head = self.lm.get_output_embeddings()
        options = {"bias": getattr(head, "bias", None), "softcap": self.softcap, "logit_scale": self.logit_scale}
        return head.weight, {**options, "temperature": temperature, "logits_dtype": torch.float32}

    def operand(self, states: Float[Tensor, "A D"]) -> Float[Tensor, "A D"]:
        """``states`` in the precision of the head's GEMMs; their sums, and the logits, are fp32 either way."""
        return states.bfloat16() if self.config.dtype == "bfloat16" else states

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The causal LM's weights under transformers' names, adapters merged one weight at a time, for a rollout engine."""
        yield from lora.merged_weights(self.lm, to_bfloat16=self.config.dtype == "bfloat16")

    def frozen_copy(self) -> Actor:
        """The policy of this moment, or with adapters the one they started from, that never learns: the reference."""
        if lora.adapted(self.lm):
            return Actor(lora.without_adapters(self.lm), self.config)  # on the same, frozen, weights
        frozen = copy.deepcopy(self).requires_grad_(False)
        if self.config.dtype == "bfloat16":
            for parameter in rounded_anyway(frozen.lm):
                parameter.data = parameter.data.bfloat16()
        return frozen

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Write a folder that plain transformers loads: safetensors (adapters merged), config, and what ``tokenizer`` (one, or a
        ``PromptBuilder``) saves."""
        lm, weights = self.lm, None
        if lora.adapted(lm):
            lm, weights = lora.without_adapters(lm), {name: tensor.cpu() for name, tensor in lora.merged_weights(lm)}
        implementation, lm.config._attn_implementation = lm.config._attn_implementation, "sdpa"
        try:
            lm.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
        finally:
            lm.config._attn_implementation = implementation


class Critic(nn.Module):
    """A value for every state: a linear head over its own body, or over the actor's hidden states."""

    def __init__(self, actor: Actor, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.body = None if config.shared_body else lora.sharing_frozen(actor.body)
        size = actor.lm.get_output_embeddings().in_features
        self.value_head = nn.Linear(size, 1, device=actor.device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)  # V = 0 until the first update: advantages start as plain reward sums
        nn.init.zeros_(self.value_head.bias)

    def values(self, hidden: Float[Tensor, "N D"], index: Int[Tensor, "K"]) -> Float[Tensor, "K"]:
        """V of the states at ``index``, fp32."""
        return self.value_head(hidden[index].float()).squeeze(-1)


class NoCritic(Critic):
    """What stands where an algorithm needs no critic: no parameters, no passes, every value 0."""

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.body = None

    def values(self, hidden: Float[Tensor, "N D"], index: Int[Tensor, "K"]) -> Float[Tensor, "K"]:
        """Zeros."""
        return torch.zeros(len(index), device=hidden.device)


class ActorCritic(nn.Module):
    """Policy and token critic, evaluated on the same packed batch."""

    def __init__(self, actor: Actor, critic: Critic) -> None:
        super().__init__()
        self.actor = actor
        self.critic = critic

    def forward(self, batch: RolloutBatch, *, temperature: float, train_policy: bool = True) -> Evaluation:
        """Log-probabilities, entropy and values of every action. ``train_policy=False`` gives only values a gradient."""
        states, values, final_values = self.states(batch, train_policy=train_policy)
        with torch.set_grad_enabled(torch.is_grad_enabled() and train_policy):
            logprobs, entropy = self.actor.logprobs(states, batch.actions, temperature)
        return Evaluation(logprobs=logprobs, entropy=entropy, values=values, final_values=final_values)

    def states(
        self, batch: RolloutBatch, *, train_policy: bool = True, layout: attention.Layout | None = None
    ) -> tuple[Float[Tensor, "A D"], Float[Tensor, "A"], Float[Tensor, "B"]]:
        """(hidden states that predict the actions, their values, values after the last actions): one pass of each body."""
        layout = layout or layout_of(batch, self.actor.config)
        with torch.set_grad_enabled(torch.is_grad_enabled() and train_policy):
            hidden = self.actor.hidden(batch, layout)
            states = hidden[batch.state_index]
        critic_hidden = hidden
        if self.critic.body is not None:
            critic_hidden = hidden_states(self.critic.body, batch, self.critic.config, layout)
        elif not self.critic.config.value_gradient_to_body:
            critic_hidden = hidden.detach()
        values = self.critic.values(critic_hidden, torch.cat([batch.state_index, batch.final_index]))
        values, final_values = values.split([batch.num_actions, batch.num_sequences])
        return states, values, final_values

    def loss_by_rows(
        self,
        batch: TrainBatch,
        loss: Callable[[Outputs, TrainRows], LossOutput],
        *,
        temperature: float,
        normalizer: float,
        train_policy: bool = True,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """(loss / normalizer, summed metrics) of a row-local loss, which is called on a chunk of rows at a time.

        The head is multiplied three times for loss and gradients (``tppo_kernels.linear_token_loss``), where log-probabilities
        that went to a loss of the whole batch would cost four.
        """
        names = [f.name for f in fields(TrainRows)]
        states, values, _ = self.states(batch.rollouts, train_policy=train_policy)
        weight, options = self.actor.head(temperature)
        if not train_policy:
            weight, options["bias"] = weight.detach(), None if options["bias"] is None else options["bias"].detach()

        def on_chunk(
            logprobs: Tensor, entropy: Tensor, values: Tensor, *rows: Tensor
        ) -> tuple[Tensor, dict[str, Tensor]]:
            given = TrainRows(**dict(zip(names, rows, strict=True)))
            out = loss(Outputs(logprobs=logprobs, entropy=entropy, values=values), given)
            return out.loss, out.metrics

        rows = [values, *(getattr(batch, name) for name in names)]
        return tk.linear_token_loss(
            self.actor.operand(states), weight, batch.rollouts.actions, on_chunk, rows, normalizer=normalizer, **options
        )


def rounded_anyway(lm: nn.Module) -> Iterator[Tensor]:
    """The parameters that autocast rounds at every use: stored in its precision they give the same bits from less memory."""
    tables = {id(table.weight) for table in lm.modules() if isinstance(table, nn.Embedding)}
    head: Any = getattr(lm, "get_output_embeddings", lambda: None)()
    for layer in lm.modules():
        if isinstance(layer, nn.Linear) and id(layer.weight) not in tables:
            yield layer.weight
            if layer.bias is not None and layer is not head:  # the loss of the head adds its bias in fp32
                yield layer.bias


def layout_of(batch: RolloutBatch, config: ModelConfig) -> attention.Layout:
    """The attention structure of a batch, for every body of the step."""
    half = config.dtype == "bfloat16"
    flash = config.attention != "sdpa" and attention.can_use_flash(batch.token_ids.device, half) is None
    return attention.build_layout(batch, flash=flash)


def hidden_states(
    body: nn.Module, batch: RolloutBatch, config: ModelConfig, layout: attention.Layout | None = None
) -> Float[Tensor, "N D"]:
    """The body's last hidden states for a packed batch, without padding."""
    device = batch.token_ids.device
    layout = layout or layout_of(batch, config)
    with autocast(config, device):
        out = body(
            input_ids=batch.token_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            layout=layout,
        )
    return out.last_hidden_state[0]


def autocast(config: ModelConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


def build(config: ModelConfig, device: torch.device | str, *, critic: bool = True) -> tuple[ActorCritic, Any]:
    """Actor and (unless none is wanted) critic from ``config.path``, checked, on ``device``; and the tokenizer.

    Raises:
        UserError: the model cannot be loaded, or its packed forward pass does not equal its own.
    """
    device = torch.device(device)
    if config.attention == "flash":
        reason = attention.can_use_flash(device, config.dtype == "bfloat16")
        if reason:
            raise UserError(f'model.attention = "flash": {reason}; use "auto" or "sdpa"')
    if config.checkpoint_offload and device.type != "cuda":
        raise UserError(
            f"model.checkpoint_offload = true moves memory off a GPU, and device is {device.type!r}: set it to false"
        )
    attention.register()
    trusted = config.trust_remote_code
    lm, tokenizer = load_policy(config.path, trust_remote_code=trusted, attn_implementation=attention.NAME)
    if config.gradient_checkpointing:
        enable_checkpointing(lm, config)
    lm.train(config.gradient_checkpointing)  # dropout is 0 either way; checkpointing only works in training mode
    actor = Actor(lm.to(device), config)
    check_packed_forward(actor)
    if config.lora_rank:
        lora.inject(lm, config)
    return ActorCritic(actor, Critic(actor, config) if critic else NoCritic(config)), tokenizer


def enable_checkpointing(lm: Any, config: ModelConfig) -> None:
    """Recompute the layers that ``config`` chooses.

    Raises:
        UserError: this transformers cannot choose layers, or offload what is kept.
    """
    enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable  # its old name
    options: dict[str, Any] = {}
    if config.checkpoint_every > 1:
        options["every_n_layers"] = config.checkpoint_every
    if config.checkpoint_offload:
        options["offload"] = True
    try:
        # No layer draws random numbers, and setting the generator back would disturb rollouts sampled at the same time.
        enable({"use_reentrant": False, "preserve_rng_state": False}, **options)
    except TypeError:
        raise UserError(
            "model.checkpoint_every and model.checkpoint_offload need a newer transformers (5.19 has them): pip install "
            "--upgrade transformers, or remove them"
        ) from None


@torch.no_grad()
def check_packed_forward(actor: Actor) -> None:
    """Compare the packed pass on two short sequences with the model's own pass on each of them.

    Raises:
        UserError: they differ: the architecture mixes tokens in a way packing does not know (a recurrent state, say).
    """
    from tppo_fast.data_types import Prompt, Rollout
    from tppo_fast.packing import pack

    vocabulary = actor.lm.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (2, 12), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [(ids[0][:7], ids[0][7:]), (ids[1][:3], ids[1][3:9])]
    rollouts = []
    for prompt, response in pairs:
        p = Prompt(token_ids=prompt, user_id="", history=(), next_queries=(), relevant_queries=())
        zeros = [0.0] * len(response)
        rollouts.append(
            Rollout(prompt=p, token_ids=response, logprobs=zeros, text="", finish_reason="stop", policy_version=0)
        )
    batch = pack(rollouts, [r.logprobs for r in rollouts]).to(actor.device)
    exact = actor.config.model_copy(update={"dtype": "float32", "attention": "sdpa"})
    kept, actor.config = actor.config, exact
    try:
        packed, _ = actor.logprobs(actor.hidden(batch)[batch.state_index], batch.actions, 1.0)
    except TypeError as error:
        raise UserError(
            f"model.path: {type(actor.lm).__name__} cannot run packed ({error}); use another model"
        ) from None
    finally:
        actor.config = kept
    own = _own_logprobs(actor, pairs)
    difference = (packed - own).abs().max().item()
    if not difference <= 1e-3:
        raise UserError(
            f"model.path: packed and ordinary log-probabilities of {type(actor.lm).__name__} differ by {difference:.2g}; "
            "its architecture cannot be packed, use another model"
        )


def _own_logprobs(actor: Actor, pairs: list[tuple[list[int], list[int]]]) -> Tensor:
    lm = actor.lm
    lm.set_attn_implementation("eager")
    try:
        out = []
        for prompt, response in pairs:
            logits = lm(input_ids=torch.tensor([prompt + response], device=actor.device), use_cache=False).logits[0]
            logp = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
            out.append(logp.gather(-1, torch.tensor(response, device=actor.device)[:, None])[:, 0])
        return torch.cat(out)
    finally:
        lm.set_attn_implementation(attention.NAME)


def architecture(folder: str) -> str:
    """The architecture name in a model folder's config, for records."""
    try:
        return json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return "unknown"
