"""How much memory a run will take, phase by phase, from its config alone: no weight is loaded, nothing is allocated.

Parameters are counted on the model built without storage. Activations are not a formula per architecture: the body runs once
on fake tensors, which have shapes and no data, and what autograd would keep for the backward pass is counted (of compiled
layers, what their graphs keep). ``tests/test_planner.py`` holds the update phase to within 15 % of a measured peak.

Not counted: what the allocator fragments, the libraries' own memory (a CUDA context is about 0.5 GiB), and activations of
architectures whose attention keeps more than its inputs and output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tppo_kernels.head import chunk_rows

from tppo_fast.algorithms import ALGORITHMS
from tppo_fast.compiling import compile_layers
from tppo_fast.config import Config
from tppo_fast.errors import UserError
from tppo_fast.model import enable_checkpointing, rounded_anyway
from tppo_fast.optimizers import bytes_per_weight

GIB = 2**30
FULL = 4
"""Bytes of an fp32 number: gradients, and weights unless ``ppo.weights`` says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What is held at once in one part of a step."""

    name: str
    """rollout, prepare or update."""
    parts: dict[str, int]
    """What -> bytes."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the model is made of."""

    parameters: int
    """Of the whole policy, a tied head counted once."""
    body: int
    """Of the transformer without its head."""
    trained: int
    """Of the policy that learn: all, or its adapters."""
    trained_body: int
    """Of a critic's own body that learn."""
    rounded: int
    """Parameters that autocast rounds at every use."""
    hidden: int
    vocabulary: int
    cache_per_token: int
    """Numbers in the key-value cache for each token."""
    saved_per_token: float
    """Bytes autograd keeps of the body for each token of a microbatch."""
    saved_once: float
    """Bytes it keeps whatever the number of tokens: the weights in half precision, under autocast."""
    largest_layer: float
    """Of them, those of one layer: what the backward pass holds in gradients of activations, at least once."""


def plan(config: Config) -> list[Phase]:
    """The phases of a step, whose sequences are the longest that the config allows.

    Args:
        config: of ``tppo-fast train``; of the model folder only ``config.json`` is read.

    Raises:
        UserError: the folder holds no model configuration, or what vLLM takes of a GPU cannot be known here.
    """
    sizes = measure(config, min(_longest(config), config.ppo.microbatch_tokens))
    own_body = ALGORITHMS[config.algorithm].needs_critic and not config.model.shared_body
    learned = sizes.trained + (sizes.trained_body if own_body else 0)
    weights, waiting = _weights(config, sizes, own_body)
    waiting["optimizer states"] = int(bytes_per_weight(config.ppo) * learned)
    engine, beside = _engine(config, sizes)
    held = weights | waiting | beside
    tokens = config.ppo.microbatch_tokens
    head = _head_bytes(config, sizes)
    streams = 4 * tokens * sizes.hidden * FULL  # hidden states of a pass that keeps nothing for a backward pass
    update = {
        "gradients": FULL * learned,
        "activations": int((1 + own_body) * (sizes.saved_per_token * tokens + sizes.saved_once)),
        "gradients of activations": int(sizes.largest_layer * tokens),
        "head workspace": head,
    }
    return [
        Phase(name="rollout", parts=(weights if config.ppo.offload else weights | waiting) | engine),
        Phase(name="prepare", parts=held | {"hidden states": streams, "head workspace": head}),
        Phase(name="update", parts=held | update),
    ]


def _longest(config: Config) -> int:
    """Tokens of the longest sequence that the config allows."""
    return config.data.max_prompt_tokens + config.rollout.max_new_tokens


def _stored(config: Config) -> int:
    """Bytes of a stored weight; adapters have ``FULL`` either way."""
    return 2 if config.ppo.weights == "bfloat16" else FULL


def _half(config: Config) -> int:
    """Bytes of a number that the forward pass computes with."""
    return 2 if config.model.dtype == "bfloat16" else FULL


def _weights(config: Config, sizes: Sizes, own_body: bool) -> tuple[dict[str, int], dict[str, int]]:
    """The policy's weights, and those that ``ppo.offload`` moves away during rollouts.

    With adapters, policy, critic and reference share their frozen weights.
    """
    stored, half = _stored(config), _half(config)
    if config.model.lora_rank:
        critic = {"critic weights": FULL * sizes.trained_body} if own_body else {}
        return {"policy weights": stored * sizes.parameters + FULL * sizes.trained}, critic
    waiting = {"critic weights": stored * sizes.body} if own_body else {}
    if config.ppo.kl_placement != "off":
        saved = max(stored - half, 0) * sizes.rounded  # see model.Actor.frozen_copy
        waiting["reference weights"] = stored * sizes.parameters - saved
    return {"policy weights": stored * sizes.parameters}, waiting


def _engine(config: Config, sizes: Sizes) -> tuple[dict[str, int], dict[str, int]]:
    """What the engine holds during rollouts, and during the rest of a step."""
    half = _half(config)
    engine = {"engine weights": half * sizes.parameters}
    if config.rollout.engine != "vllm":
        sampled = min(config.rollout.prompts_per_step * config.rollout.samples_per_prompt, 256)
        cache = sampled * _longest(config) * sizes.cache_per_token * half  # it lives no longer than a call
        return engine | {"key-value cache": cache}, engine
    engine["key-value cache"] = _vllm_cache(config, engine["engine weights"])
    if config.vllm.process == "server":
        engine = {}  # planned for where it runs
    beside = engine if config.vllm.sleep == "off" else {}
    if config.model.lora_rank:
        engine = engine | {"merged weights": _stored(config) * sizes.parameters}  # while they are published
    return engine, beside


def measure(config: Config, sequence: int) -> Sizes:
    """Count parameters, cache and activations of ``config.model.path`` on fake tensors."""
    settings = _settings(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        lm = _built(config, settings)
        body: Any = lm.base_model
        parameters, body_size = _count(lm), _count(body)
        rounded = sum(p.numel() for p in rounded_anyway(lm))
        if config.model.lora_rank:
            _adapt(lm, config)
        trained, trained_body = (_count(module, learned=True) for module in (lm, body))
        short = max(sequence // 2, 1)
        some, most = (_saved_bytes(body, length, config.model.dtype == "bfloat16") for length in (short, sequence))
    each = (most - some) / max(sequence - short, 1)
    once = max(most - each * sequence, 0.0)
    text = settings.get_text_config()
    layers = text.num_hidden_layers
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layer = each / layers / 2  # about half of what a layer keeps is wide, and has its gradient at one time
    if config.model.gradient_checkpointing:
        # Each layer's input is kept, and one layer is computed again with all it keeps; a kept last layer goes first.
        plain = config.model_copy(update={"model": config.model.model_copy(update={"gradient_checkpointing": False})})
        last_recomputed = (layers - 1) % config.model.checkpoint_every == 0
        layer = measure(plain, sequence).largest_layer * (3 if last_recomputed else 1)
        kept = 0 if config.model.checkpoint_offload else -(-layers // config.model.checkpoint_every)
        each += kept * text.hidden_size * _stored(config)
    return Sizes(
        parameters=parameters,
        body=body_size,
        trained=trained,
        trained_body=trained_body,
        rounded=rounded,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        cache_per_token=2 * layers * heads * size,
        saved_per_token=each,
        saved_once=once,
        largest_layer=layer,
    )


def _settings(config: Config) -> Any:
    """The model's own configuration.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    from transformers import AutoConfig

    path = config.model.path
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"model.path = {path!r}: there is no config.json; give the folder of a causal language model")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model.path = {path!r}: its config.json cannot be used ({' '.join(str(error).split())})"
        ) from None


def _built(config: Config, settings: Any) -> Any:
    """The model without weights, with its layers recomputed or compiled as in the run."""
    from transformers import AutoModelForCausalLM

    stored = getattr(torch, config.ppo.weights)
    lm: Any = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa", dtype=stored)
    if config.model.gradient_checkpointing:
        lm.train()
        enable_checkpointing(lm, config.model.model_copy(update={"checkpoint_offload": False}))
    if config.model.compile:  # what a graph keeps is decided before kernels are made of it
        compile_layers([lm], backend="aot_eager_decomp_partition")
    return lm


class _Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter: peft's cannot be made on fake tensors."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def _adapt(lm: Any, config: Config) -> None:
    """Freeze ``lm`` and put adapters where ``lora.inject`` would."""
    lm.requires_grad_(False)
    head, wanted = lm.get_output_embeddings(), config.model.lora_targets
    for name, layer in list(lm.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not head and (not wanted or name.rpartition(".")[2] in wanted):
            lm.set_submodule(name, _Adapted(layer, config.model.lora_rank))


def _count(module: nn.Module, *, learned: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not learned)


def _saved_bytes(body: Any, sequence: int, half: bool) -> int:
    """Bytes of distinct storages that one pass over a sequence keeps for the backward pass, parameters left out."""
    own = {p.untyped_storage()._cdata for p in body.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage  # held, so that no other storage takes its place
        return tensor

    unchanged: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor  # noqa: E731
    ids = torch.zeros(1, sequence, dtype=torch.int64)
    positions = torch.arange(sequence)[None]
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, unchanged),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        out = body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    del out
    return sum(storage.nbytes() for storage in seen.values())


def _head_bytes(config: Config, sizes: Sizes) -> int:
    """The chunked head's one reused buffer of fp32 logits; in bf16 also a chunk and the weight as the GEMMs read them."""
    half = config.model.dtype == "bfloat16"
    device = torch.device("cuda" if _on_gpu(config) else "cpu")
    actions = -(-config.ppo.microbatch_tokens * config.rollout.max_new_tokens // _longest(config))
    logits = min(chunk_rows(None, sizes.vocabulary, torch.float32, device), actions) * sizes.vocabulary
    rounded = sizes.hidden * sizes.vocabulary if config.ppo.weights == "float32" else 0
    return FULL * logits + 2 * half * (logits + rounded)


def _vllm_cache(config: Config, engine_weights: int) -> int:
    """Bytes of vLLM's key-value cache."""
    own = config.vllm
    if own.kv_cache_gib is not None or not _on_gpu(config):
        return int((own.kv_cache_gib or 1.0) * GIB)
    if not torch.cuda.is_available():
        raise UserError(
            "vllm.kv_cache_gib is not set: vLLM then takes what vllm.gpu_memory_share leaves of the GPU, and there is no GPU "
            "here to ask for its size; set vllm.kv_cache_gib"
        )
    total = torch.cuda.get_device_properties(0).total_memory
    return max(int(own.gpu_memory_share * total) - engine_weights, 0)


def _on_gpu(config: Config) -> bool:
    return config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())


def describe(phases: list[Phase]) -> str:
    """A table in text: GiB of every part in every phase."""
    names = list(dict.fromkeys(name for phase in phases for name in phase.parts))
    lines = [f"{'GiB':26}" + "".join(f"{phase.name:>10}" for phase in phases)]
    for name in names:
        cells = (f"{phase.parts[name] / GIB:10.2f}" if name in phase.parts else f"{'-':>10}" for phase in phases)
        lines.append(f"{name:26}" + "".join(cells))
    lines.append(f"{'total':26}" + "".join(f"{phase.total / GIB:10.2f}" for phase in phases))
    return "\n".join(lines)
