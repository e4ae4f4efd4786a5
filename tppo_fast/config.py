"""Every setting of a run: typed, validated, torch-free. Unknown keys are errors that name the nearest one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tppo_fast.reward_config import RewardConfig
from tppo_fast.sections import (
    TEMPLATE,
    Count,
    NonNegative,
    NotBlank,
    OfStep,
    Passes,
    PathText,
    Pluggable,
    Positive,
    Section,
    Template,
    Unit,
    build_section,
    load_section,
)
from tppo_fast.vllm_config import VLLMConfig

LEAST_PROMPT = 8
"""The least ``data.max_prompt_tokens``."""


class ModelConfig(Section):
    path: PathText = ""
    """Folder of a transformers causal LM and its tokenizer (safetensors). Required."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward and backward pass; master weights stay fp32 (bfloat16 runs under autocast)."""
    shared_body: bool = False
    """True: the value head reads the policy's hidden states. False: the critic has a body of its own."""
    value_gradient_to_body: bool = True
    """With a shared body, whether the value loss also trains the body."""
    lora_rank: Annotated[int, Field(ge=0)] = 0
    """Train low-rank adapters of this rank and keep the weights frozen (needs peft); 0 trains every weight. The reference
    policy is then the same weights without adapters."""
    lora_alpha: Count = 32
    """The adapters' output is scaled by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of the layers that get adapters, e.g. ["q_proj", "v_proj"]. Empty: every linear layer except the head; experts that
    lie in one tensor get none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    checkpoint_every: Count = 1
    """With ``gradient_checkpointing``, recompute every so many layers, starting with the first; 1 is all of them."""
    checkpoint_offload: bool = False
    """With ``gradient_checkpointing``, what is kept for recomputing (a hidden state per layer and token) waits in pinned main
    memory. GPU only; the copies take time."""
    compile: bool = False
    """Compile every layer with torch.compile, once for any number of tokens (on a CPU it needs a C++ compiler): fewer and larger
    kernels, and half of the activations kept, which ``tppo-fast plan`` does not count. Passes with and without gradients then
    differ by rounding, and so does the first ratio from 1."""
    share_prompts: bool = True
    """Responses to one prompt share its tokens in every training pass: the same numbers to rounding, less compute."""
    attention: Literal["auto", "sdpa", "flash"] = "auto"
    """Packed attention: exact torch SDPA, flash kernels (CUDA, bfloat16: flash-attn's if installed, else torch's), or flash
    where it can run."""
    trust_remote_code: bool = False
    """Run Python code that ships inside the model folder. Off unless you have read that code."""

    @model_validator(mode="after")
    def _adapted(self) -> ModelConfig:
        if self.lora_targets and not self.lora_rank:
            raise ValueError(
                "model.lora_targets has no effect with model.lora_rank = 0: set a rank, e.g. 16, or remove lora_targets"
            )
        return self

    @model_validator(mode="after")
    def _checkpointed(self) -> ModelConfig:
        if not self.gradient_checkpointing and (self.checkpoint_every > 1 or self.checkpoint_offload):
            name = "checkpoint_offload" if self.checkpoint_offload else "checkpoint_every"
            raise ValueError(
                f"model.{name} = {getattr(self, name)} has no effect with model.gradient_checkpointing = false: set that "
                f"to true, or remove {name}"
            )
        return self


class DataConfig(Section):
    train: PathText = "synthetic"
    """Training sessions: a .jsonl or .parquet file, or "synthetic" for the embedded generator."""
    eval: PathText | None = None
    """Held-out sessions. None: ``eval_fraction`` of the training file's users are held out."""
    eval_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of USERS held out when ``eval`` is None; no user stands on both sides."""
    split_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Which users those are: the same in every run on the same file, whatever its ``seed``."""
    synthetic_sessions: Annotated[int, Field(ge=20, le=1_000_000)] = 4000
    """How many sessions the embedded generator makes."""
    template: Template = TEMPLATE
    """Prompt text. {history} is replaced by the rendered history and must occur exactly once."""
    response_prefix: str = " "
    """Text between prompt and response in supervision, part of the response."""
    separator: NotBlank = ", "
    """Text between the queries of one response; a reward model must have been trained with the same."""
    max_prompt_tokens: Annotated[int, Field(ge=LEAST_PROMPT)] = 512
    """Longer histories lose their OLDEST entries until the prompt fits."""
    num_queries: Count = 3
    """How many next queries a response should hold; supervision uses the first ones of ``next_queries``."""


class RolloutConfig(Section):
    engine: Pluggable = "hf"
    """Who samples: "hf" (transformers generate), "vllm" or module:function returning a RolloutEngine."""
    prompts_per_step: OfStep = 16
    """Distinct prompts in each step."""
    samples_per_prompt: OfStep = 4
    """Responses sampled for each prompt."""
    max_new_tokens: Count = 48
    """Longest response; longer ones are cut and marked truncated."""
    temperature: Positive = 1.0
    """Sampling temperature; every log-probability of the run is taken at it."""
    top_p: Unit = 1.0
    """Must be 1: with nucleus sampling the ratio's log-probabilities belong to another distribution."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Must be 0 (off), for the same reason."""

    staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """1: sample each step's rollouts during the update of the step before (a policy that is one step old); the loss weighs
    them by truncated importance weights, see ``ppo.importance_cap``. 0: wait for the update. A reward of yours that draws
    random numbers then needs a generator of its own, for the run to repeat."""
    parity_gate: bool = True
    """Stop when engine and trainer disagree about the log-probabilities of fresh rollouts; turn off for logged rollouts."""
    parity_mean_limit: Positive | None = None
    """Largest parity/mean, in nats. None: 0.001 in float32, 0.1 in bfloat16."""
    parity_max_limit: Positive | None = None
    """Largest parity/max, in nats. None: 0.02 in float32, 5 in bfloat16."""

    @model_validator(mode="after")
    def _unbiased(self) -> RolloutConfig:
        if self.top_p < 1.0 or self.top_k > 0:
            name, value = ("top_p", self.top_p) if self.top_p < 1.0 else ("top_k", self.top_k)
            raise ValueError(
                f"rollout.{name} = {value}: sampling must be from the full distribution, otherwise the PPO ratio is "
                "biased; set top_p = 1.0 and top_k = 0, and use temperature instead"
            )
        return self


class PPOConfig(Section):
    lr: NonNegative = 1e-5
    """Peak learning rate of the policy."""
    critic_lr: NonNegative | None = None
    """Peak learning rate of the critic (a separate body and the value head). None: ten times ``lr``, and at least 3e-4 with
    ``model.shared_body``, where it is the value head's alone."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up, over all optimizer steps of the run (the policy's begins after ``value_warmup_steps``)."""
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of linear learning-rate warm-up, from 0."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """"adamw": torch's fused AdamW. "adamw8bit": torchao's, with states of 2 bytes for each weight instead of 8; the host then
    waits for the device once in each optimizer step, and torch compiles that step at the first one (a minute on a CPU)."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """How weights are stored. "bfloat16": half the memory, with ``model.dtype`` "bfloat16" alone; weights that learn are rounded
    stochastically, which needs ``optimizer`` "adamw8bit"; adapters stay fp32, with any optimizer."""
    offload: bool = False
    """While rollouts are sampled, optimizer states, reference and a critic's own body wait in pinned main memory. GPU only;
    goes with ``vllm.sleep``, which frees the engine's memory during the update."""
    weight_decay: NonNegative = 0.0
    """AdamW weight decay."""
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """AdamW first-moment decay."""
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """AdamW second-moment decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this global norm, policy and critic separately."""
    epochs: Passes = 2
    """Passes over each batch of rollouts."""
    minibatches: OfStep = 1
    """Optimizer steps per pass."""
    microbatch_tokens: Annotated[int, Field(ge=16)] = 8192
    """Most tokens in one forward pass; changes memory, never the gradient."""
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """The ratio is clipped from below at 1 - clip_low."""
    clip_high: Positive = 0.2
    """The ratio is clipped from above at 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """Bound on the loss of negative advantages (arXiv 1912.09729); None is off."""
    loss: Pluggable = "ppo"
    """"ppo" or module:function, called as the built-in one in ``tppo_fast.losses``."""
    value_coef: NonNegative = 0.5
    """Weight of the value loss."""
    value_clip: Positive | None = None
    """Clip of the value's move from its old value, in units of the return. None is off: a critic that starts far from its
    returns would stop learning once it has moved that far, see dev/LOG.md."""
    value_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """First steps of the run in which only the critic learns."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    kl_placement: Literal["reward", "loss", "off"] = "reward"
    """KL to the reference policy: subtracted from each token's reward (k1), added to the loss, or absent. Algorithms without a
    critic compare rewards within groups, which would rescale a penalty: their default is "loss", and "reward" is refused."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the loss term: k2 or k3, as k1's gradient does not depend on the reference. The reward always uses k1."""
    kl_coef: NonNegative = 0.05
    """Initial KL coefficient."""
    kl_target: Positive | None = None
    """Adapt the coefficient so that the KL per token stays near this many nats; None keeps it fixed."""
    kl_horizon: Positive = 10_000.0
    """Rollouts over which the adaptive coefficient reacts (arXiv 1909.08593)."""
    target_kl: Positive | None = None
    """End a batch's optimizer steps before the first whose minibatch has an approx_kl (new to old policy) above this many nats
    per token. A batch's first step is always taken: there both are one policy. The host then waits once a step."""
    gamma: Unit = 1.0
    """Discount."""
    lam: Unit = 0.95
    """GAE lambda of the policy's advantages."""
    lam_critic: Unit | None = None
    """GAE lambda of the critic's targets (VC-PPO, arXiv 2503.01491). None: ``lam``."""
    lam_adaptive: Positive | None = None
    """a of the length-adaptive lambda 1 - 1 / (a length) (VAPO, arXiv 2504.05118), replacing ``lam``; None is off."""
    bootstrap_truncated: bool = False
    """Value of the state after a cut response: the critic's estimate (True) or 0 (False)."""
    whiten_advantages: bool = True
    """Zero mean and unit variance over the step's actions."""
    old_logprobs: Literal["recompute", "engine"] = "recompute"
    """The ratio's denominator: recomputed by the trainer, or as reported by the rollout engine. ``tppo_fast.parity`` says which
    to use when."""

    importance_cap: Positive | None = None
    """With recomputed old log-probs, each token's policy loss is weighted by min(pi_old / pi_behaviour, cap): truncated
    importance sampling, against staleness and an engine's own rounding. None: 2 with ``rollout.staleness = 1``, else off."""

    @model_validator(mode="after")
    def _kl_term(self) -> PPOConfig:
        if self.kl_target is not None and self.kl_placement == "off":
            raise ValueError(
                f'ppo.kl_target = {self.kl_target} has no effect with ppo.kl_placement = "off"; '
                "choose reward or loss, or remove kl_target"
            )
        if self.kl_placement == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                'ppo.kl_estimator = "k1" with ppo.kl_placement = "loss": its gradient is that of the log-probability alone and '
                "pulls towards no reference; use k2 or k3"
            )
        return self


class TrainConfig(Section):
    steps: Count = 100
    """Steps; in PPO one batch of rollouts each, in supervision one optimizer step each."""
    eval_every: Annotated[int, Field(ge=0)] = 10
    """Steps between evaluations on held-out sessions; 0 evaluates at the start and the end only."""
    eval_prompts: Count = 128
    """Held-out sessions per evaluation, one response each."""
    eval_greedy: bool = False
    """Evaluate the most likely response instead of a sampled one; ``rollout.temperature`` does not matter then."""
    save_every: Annotated[int, Field(ge=0)] = 20
    """Steps between checkpoints; 0 saves at the end only."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept."""
    show_examples: Annotated[int, Field(ge=0)] = 3
    """Responses of the first step printed with each token's label and reward."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (needs the wandb package)."""


class RunConfig(Section):
    """What every kind of run has: where, with which model, on which sessions, how to sample, how often to look."""

    run_dir: Path = Path("runs/train")
    """Where metrics, checkpoints and the final model go."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Decides data order, sampling and initialisation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA when there is a GPU."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads for torch; 0 leaves torch's own choice."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    vllm: VLLMConfig = VLLMConfig()
    train: TrainConfig = TrainConfig()


class Config(RunConfig):
    """A run of ``tppo-fast train``."""

    processes: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that share every step, one for each GPU of this machine, or several on its CPU. Each holds the whole model; the
    same numbers to rounding but for the responses, which each samples with a seed of its own. ``threads`` are those of each (0:
    an equal part). A loss or engine of yours is asked in every process, for its share; a reward in the first, for all."""

    algorithm: Literal["tppo", "control", "ppo", "grpo", "bot-grpo"] = "tppo"
    """"tppo": token rewards, token critic. "control": the same rewards summed onto the last token. "ppo": a sentence score
    there. "grpo", "bot-grpo": sentence scores or token rewards, normalised over the responses to one prompt, no critic."""
    reward: RewardConfig = RewardConfig()
    ppo: PPOConfig = PPOConfig()

    @model_validator(mode="after")
    def _fits_algorithm(self) -> Config:
        placement = {"control": "last", "ppo": "sentence", "grpo": "sentence", "bot-grpo": "token"}.get(self.algorithm)
        given = self.reward.placement
        if placement and "placement" in self.reward.model_fields_set and given != placement:
            raise ValueError(
                f'reward.placement = "{given}": algorithm = "{self.algorithm}" has its reward as "{placement}"; '
                "remove reward.placement"
            )
        if self.algorithm in ("grpo", "bot-grpo"):
            if "kl_placement" not in self.ppo.model_fields_set:
                object.__setattr__(self, "ppo", self.ppo.model_copy(update={"kl_placement": "loss"}))
            elif self.ppo.kl_placement == "reward":
                raise ValueError(
                    f'ppo.kl_placement = "reward": algorithm = "{self.algorithm}" normalises rewards within a group, which '
                    'would rescale the penalty; use "loss" or "off"'
                )
            if self.rollout.samples_per_prompt < 2:
                raise ValueError(
                    f'rollout.samples_per_prompt = 1: algorithm = "{self.algorithm}" compares the responses to one '
                    "prompt, give at least 2"
                )
            if self.ppo.value_warmup_steps:
                raise ValueError(
                    f'ppo.value_warmup_steps = {self.ppo.value_warmup_steps}: algorithm = "{self.algorithm}" has no critic '
                    "to warm up, set it to 0"
                )
        return self

    @model_validator(mode="after")
    def _fits_batch(self) -> Config:
        if self.ppo.minibatches > self.rollout.prompts_per_step:
            raise ValueError(
                f"ppo.minibatches = {self.ppo.minibatches}: the responses to one prompt stay together, and "
                f"rollout.prompts_per_step = {self.rollout.prompts_per_step}; give at most that"
            )
        if self.processes > self.rollout.prompts_per_step // self.ppo.minibatches:
            raise ValueError(
                f"processes = {self.processes}: each takes part of every minibatch, which holds the responses to "
                f"{self.rollout.prompts_per_step // self.ppo.minibatches} prompts (rollout.prompts_per_step / ppo.minibatches); "
                "give at most that"
            )
        if self.processes > 1 and self.rollout.engine == "vllm" and self.vllm.process == "server":
            raise ValueError(
                f'processes = {self.processes} with vllm.process = "server": each process samples with an engine of its own; use '
                '"worker" or "colocated"'
            )
        return self

    @model_validator(mode="after")
    def _stored(self) -> Config:
        if self.ppo.weights == "float32":
            return self
        if self.model.dtype != "bfloat16":
            raise ValueError(
                f'ppo.weights = "bfloat16" with model.dtype = "{self.model.dtype}": set model.dtype = "bfloat16", too'
            )
        if not self.model.lora_rank and self.ppo.optimizer != "adamw8bit":
            raise ValueError(
                f'ppo.weights = "bfloat16" with ppo.optimizer = "{self.ppo.optimizer}": steps smaller than bfloat16 can '
                'hold would vanish; set optimizer = "adamw8bit" (it rounds stochastically) or model.lora_rank'
            )
        elsewhere = self.rollout.engine == "vllm" and self.vllm.process != "colocated"
        if self.rollout.staleness and not self.model.lora_rank and not elsewhere:
            raise ValueError(
                f'rollout.staleness = {self.rollout.staleness} with ppo.weights = "bfloat16": the update rounds by the '
                "generator that an engine in this process samples with at the same time, and no run would repeat; set "
                'vllm.process = "worker" or "server", or staleness 0'
            )
        return self

    @model_validator(mode="after")
    def _awake(self) -> Config:
        if self.ppo.offload and self.rollout.staleness:
            raise ValueError(
                f"ppo.offload = true: with rollout.staleness = {self.rollout.staleness} the engine samples during the "
                "update, and nothing can be moved away; set offload = false, or staleness 0"
            )
        if self.vllm.sleep != "off" and self.rollout.staleness:
            raise ValueError(
                f'vllm.sleep = "{self.vllm.sleep}": with rollout.staleness = {self.rollout.staleness} the engine samples '
                'during the update and cannot sleep; use "off", or staleness 0'
            )
        return self


def build(values: dict[str, Any]) -> Config:
    """Validate a nested dict: see ``sections.build_section``."""
    return build_section(values, Config)


def load(path: str | os.PathLike[str], overrides: list[str] | None = None) -> Config:
    """A config from a TOML file, with ``--section.key value`` overrides: see ``sections.load_section``."""
    return load_section(path, overrides or [], Config)
