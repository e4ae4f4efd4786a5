"""From the trainer's weights to a live engine, checked: never a silent no-op, never half a policy, never an old prefix."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.pytorch_utils import Conv1D

from tppo_fast import seeding
from tppo_fast.data_types import Prompt, Rollout
from tppo_fast.errors import EngineError, EngineLost, UserError
from tppo_fast.rollout.base import (
    SamplingParams,
    answered,
    check_lengths,
    decoder,
    fitting,
    loaded,
    max_positions,
    stop_tokens,
)

EXACT_DOTS = ("TRITON_F32_DEFAULT", "ieee")
"""Environment variable and value that keep Triton, vLLM's attention in float32 on a GPU, from rounding to TF32, which the checks
of a publication would refuse. Triton reads it when it compiles a kernel."""
PROBE_LENGTH = 24
"""Tokens of the probe prompt, where the model has positions for them and for one token more."""
PROBE_LIMIT = {"float32": 1e-3, "bfloat16": 0.3}
"""Largest mean |engine - trainer| on the probe prompt, in nats per token."""
ZERO = torch.finfo(torch.float32).tiny
"""Largest difference of a live entry from the published one: a GEMM may take what is smaller for zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveSettings:
    """What starts a live engine; JSON values, so that a worker process can be told."""

    path: str
    """Folder of the transformers model."""
    dtype: Literal["float32", "bfloat16"]
    """Arithmetic of the engine."""
    device: Literal["cpu", "cuda"]
    """Where it runs."""
    max_model_len: int
    """Longest prompt plus response, in tokens, the probe's included."""
    kv_cache_gib: float | None
    """Memory for the key-value cache, in GiB; None: 1 on a CPU, what gpu_memory_share leaves on a GPU."""
    gpu_memory_share: float
    """Share of the GPU's memory that the engine may take, from 0 to 1."""
    sleeps: bool
    """Whether ``sleep`` frees memory in place."""
    eager: bool
    """No CUDA graphs and no compilation."""
    trust_remote_code: bool
    """Run code of the model folder."""
    threads: int
    """CPU threads of a worker process."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class LiveEngine(Protocol):
    """An engine that samples with whatever weights it was last sent, in this process or another one."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, stop: Sequence[int]
    ) -> list[tuple[list[int], list[float]]]: ...
    def probe(self, token_ids: Sequence[int]) -> Tensor: ...
    def start_update(self) -> None: ...
    def update(self, bucket: Sequence[tuple[str, Tensor]]) -> None: ...
    def finish_update(self, version: int) -> None: ...
    def fingerprint(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]: ...
    def sleep(self) -> None: ...
    def close(self) -> None: ...
    @property
    def alive(self) -> bool: ...


def sampling_arguments(index: int, sampling: SamplingParams, stop: Sequence[int]) -> dict[str, Any]:
    """vLLM's parameters for prompt ``index``. vLLM gives sample i of a prompt the seed ``seed + i``."""
    return {
        "n": 1 if sampling.greedy else sampling.n,
        "temperature": 0.0 if sampling.greedy else sampling.temperature,  # of 0, log-probabilities are those at 1
        "seed": seeding.derive(sampling.seed, "prompt", index) >> 1,  # room for "+ i" below 2**63
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(stop),
        "logprobs": 0,  # the sampled token's alone
    }


# -------------------------------------------------------------------- fingerprints


def spread(size: int, count: int) -> Tensor:
    """At most ``count`` indices below ``size``, evenly spread."""
    return torch.arange(size)[:: max(size // count, 1)][:count]


def fingerprint(tensor: Tensor) -> Tensor | None:
    """Some entries of a parameter, fp32: 64 of a vector, 4 columns of a matrix one after the other."""
    if tensor.ndim not in (1, 2):
        return None
    chosen = spread(tensor.shape[-1], 64 if tensor.ndim == 1 else 4).to(tensor.device)
    return tensor[..., chosen].t().flatten().float().cpu()


# -------------------------------------------------------------------- the trainer's side


class _MetaParameters:
    """``with _MetaParameters():`` parameters registered inside hold no memory; buffers are real."""

    def __enter__(self) -> None:
        self._original = original = nn.Module.register_parameter

        def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            if param is not None and param.device.type != "meta":
                param = nn.Parameter(param.to("meta"), requires_grad=False)
            original(module, name, param)

        nn.Module.register_parameter = register  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        nn.Module.register_parameter = self._original  # type: ignore[method-assign]


class Policy:
    """The policy's architecture without weights: what must be published, and what published weights compute."""

    def __init__(self, path: str, dtype: Literal["float32", "bfloat16"], *, trust_remote_code: bool = False) -> None:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with _MetaParameters():
            self._lm: Any = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, attn_implementation="sdpa"
            ).eval()
        self._lm.tie_weights()
        self.dtype: Literal["float32", "bfloat16"] = dtype
        self._shapes: dict[str, tuple[int, ...]] = {name: tuple(t.shape) for name, t in self._lm.state_dict().items()}
        self._canonical: dict[str, str] = {}
        owner: dict[int, str] = {}
        for name, parameter in self._lm.named_parameters(remove_duplicate=False):
            self._canonical[name] = owner.setdefault(id(parameter), name)
        self._transposed = {f"{name}.weight" for name, m in self._lm.named_modules() if isinstance(m, Conv1D)}
        self.config: Any = config
        self.generation_config: Any = self._lm.generation_config
        with contextlib.suppress(OSError):  # a folder without: what config.json says, as transformers has it
            self.generation_config = GenerationConfig.from_pretrained(path)
        vocabulary = config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        length = min(PROBE_LENGTH, (max_positions(config) or PROBE_LENGTH + 1) - 1)
        self.probe_ids: list[int] = torch.randint(vocabulary, (length,), generator=generator).tolist()

    def checked(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The weights by name, complete and of the right shapes, tied ones equal.

        Raises:
            UserError: naming the first weight that does not fit.
        """
        named = {name: tensor.detach() for name, tensor in fitting(weights, self._shapes)}
        for name, canonical in self._canonical.items():
            if named[name].data_ptr() != named[canonical].data_ptr() and not torch.equal(named[name], named[canonical]):
                raise UserError(f"weight {name!r} differs from {canonical!r}, to which the model ties it: publish one")
        return named

    def unique(self, named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every weight once: of tied ones, the first name."""
        for name, tensor in named.items():
            if self._canonical.get(name, name) == name:
                yield name, tensor

    def with_ties(self, unique: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse: tied names share their tensor."""
        return {name: unique[self._canonical.get(name, name)] for name in self._shapes}

    @torch.no_grad()
    def probe(self, named: Mapping[str, Tensor]) -> Tensor:
        """Log-probabilities of the probe prompt's tokens after the first by transformers with these weights, fp32."""
        device = next(iter(named.values())).device
        _move_buffers(self._lm, device)
        ids = torch.tensor([self.probe_ids], device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            out = torch.func.functional_call(
                self._lm, dict(self.unique(named)), kwargs={"input_ids": ids, "use_cache": False}
            )
        logp = out.logits[0, :-1].float().log_softmax(-1)
        return logp.gather(-1, ids[0, 1:, None])[:, 0].cpu()

    @torch.no_grad()
    def verify(self, named: Mapping[str, Tensor], live: LiveEngine) -> None:
        """Compare a live engine with what was published.

        Raises:
            EngineError: naming the first parameter that is not the published one, or the probe's distance.
        """
        dtype = getattr(torch, self.dtype)
        named_live = {name: t.t() if name in self._transposed else t for name, t in named.items()}
        found = live.fingerprint({name: tuple(t.shape) for name, t in named_live.items()})
        if not found:
            raise EngineError("no live parameter of the engine could be found to compare with the published weights")
        for name, values in found.items():
            expected = fingerprint(named_live[name])
            assert expected is not None
            distance = float((values - expected.to(dtype).float()).abs().max())
            if not distance <= ZERO:
                raise EngineError(
                    f"weight {name!r} of the rollout engine is not the published one (an entry is off by {distance:.2g}): "
                    "the engine samples from another policy; restart it"
                )
        gap = float((live.probe(self.probe_ids) - self.probe(named)).abs().mean())
        if not gap <= PROBE_LIMIT[self.dtype]:
            raise EngineError(
                f"after publishing, the engine's log-probabilities of a probe prompt are {gap:.2g} nats per token from "
                f"the trainer's, at most {PROBE_LIMIT[self.dtype]:g} is allowed in {self.dtype}: restart it"
            )


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            if buffer.device != device:
                setattr(child, name, buffer.to(device))


def buckets(weights: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Groups of neighbouring weights of at most ``limit`` bytes, a larger weight alone."""
    group: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        nbytes = tensor.numel() * tensor.element_size()
        if group and size + nbytes > limit:
            yield group
            group, size = [], 0
        group.append((name, tensor))
        size += nbytes
    if group:
        yield group


# -------------------------------------------------------------------- the engine


class PublishedEngine:
    """A rollout engine around a live one: checks what is published, keeps the version, writes rollouts."""

    def __init__(
        self, live: LiveEngine, policy: Policy, tokenizer: Any, *, max_model_len: int, bucket_bytes: int = 1 << 28
    ) -> None:
        """``max_model_len``: the longest prompt plus response that the live engine was started for."""
        self.live = live
        self._policy = policy
        self._decode = decoder(tokenizer)
        self._stop = stop_tokens(policy.generation_config, tokenizer)
        self._max_model_len = max_model_len
        self._bucket_bytes = bucket_bytes
        self._version: int | None = None

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        version = loaded(self._version)
        longest = max((len(p.token_ids) for p in prompts), default=0) + sampling.max_new_tokens
        check_lengths(longest, self._policy.config)
        if longest > self._max_model_len:
            raise UserError(
                f"a prompt with its response may need {longest} tokens, the vLLM engine was started for "
                f"{self._max_model_len}: raise data.max_prompt_tokens, or shorten the prompts"
            )
        answers = self._sample([p.token_ids for p in prompts], sampling)
        repeated = [prompt for prompt in prompts for _ in range(sampling.n)]
        if sampling.greedy:  # the engine answers each prompt once
            answers = [answer for answer in answers for _ in range(sampling.n)]
        return [
            answered(p, *answer, decode=self._decode, stop=self._stop, version=version)
            for p, answer in zip(repeated, answers, strict=True)
        ]

    def _sample(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> list[tuple[list[int], list[float]]]:
        return self.live.generate(prompts, sampling, self._stop)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        named = self._policy.checked(weights)
        self._version = None  # whatever goes wrong from here on, nothing is sampled from half a policy
        self._publish(named, version)
        self._version = version

    def _publish(self, named: Mapping[str, Tensor], version: int, sent: Mapping[str, Tensor] | None = None) -> None:
        """``sent``: the same weights at another place, from which they travel."""
        dtype = getattr(torch, self._policy.dtype)
        cast = ((name, tensor.to(dtype)) for name, tensor in self._policy.unique(sent or named))
        self.live.start_update()
        for bucket in buckets(cast, self._bucket_bytes):
            self.live.update(bucket)
        self.live.finish_update(version)
        self._policy.verify(named, self.live)

    def sleep(self) -> None:
        """Free what the live engine can do without until the next ``load_weights``."""
        self._version = None
        self.live.sleep()

    def close(self) -> None:
        self.live.close()


__all__ = ["EngineLost", "LiveEngine", "LiveSettings", "Policy", "PublishedEngine"]
