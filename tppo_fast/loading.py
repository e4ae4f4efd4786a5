"""A tokenizer and a causal LM from a folder or the hub: safetensors alone, and one sentence where it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tppo_fast import model_folder
from tppo_fast.errors import UserError

STRICT: dict[str, Any] = {
    "dtype": torch.float32, "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True,
}  # fmt: skip
"""What ``from_pretrained`` is given so that ``complete`` can say which weights the file did not fill."""


def load_policy(path: str, *, trust_remote_code: bool = False, attn_implementation: str = "sdpa") -> tuple[Any, Any]:
    """``load_causal_lm`` and ``load_tokenizer`` of one folder, which must fit.

    Raises:
        UserError: as those two, or the tokenizer has more tokens than the model.
    """
    lm = load_causal_lm(path, trust_remote_code=trust_remote_code, attn_implementation=attn_implementation)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    check_vocabulary(f"model.path = {path!r}", tokenizer, lm.get_input_embeddings().num_embeddings)
    return lm, tokenizer


def check_vocabulary(field: str, tokenizer: Any, rows: int) -> None:
    """Refuse a tokenizer whose tokens a model's embedding table of ``rows`` rows does not all hold."""
    if len(tokenizer) > rows:
        raise UserError(
            f"{field}: its tokenizer has {len(tokenizer)} tokens and its embedding table {rows} rows: give the tokenizer "
            "that belongs to the model, or resize the model's embeddings"
        )


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds for a bad folder
        raise _unreadable(path, "tokenizer", error) from None


def load_causal_lm(path: str, *, trust_remote_code: bool = False, attn_implementation: str = "sdpa") -> Any:
    """A transformers causal LM in fp32 from safetensors alone, dropout off.

    Raises:
        UserError: the folder is missing, holds no causal LM, or its weights are not safetensors.
    """
    model_folder.check(path, "model.path")
    try:
        return read_causal_lm(path, trust_remote_code=trust_remote_code, attn_implementation=attn_implementation)
    except KeyError as error:
        own = error.args == (attn_implementation,)  # of older classes, which choose from a table of their own
        reason = ValueError("its architecture has attention of its own and cannot be packed: use another model")
        raise _unreadable(path, "causal language model", reason if own else error) from None
    except Exception as error:
        raise _unreadable(path, "causal language model", error) from None


def load_settings(path: str, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a causal LM's folder, without its weights.

    Raises:
        UserError: it cannot be read, or its folder has no weights.
    """
    model_folder.check(path, "model.path")
    try:
        settings = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _unreadable(path, "causal language model", error) from None
    return settings


def read_causal_lm(path: str, *, trust_remote_code: bool = False, attn_implementation: str = "sdpa") -> Any:
    """``load_causal_lm`` of a folder that no setting names: what transformers raises is left as it is."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)  # the ratio needs deterministic log-probabilities
    lm = complete(
        AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            **STRICT,
        )
    )
    _make_savable(lm)
    return lm


def complete(loaded: Any, is_new: Callable[[str], bool] = lambda _: False) -> Any:
    """The model of what ``from_pretrained`` gave with ``STRICT``: what the file does not fill, transformers fills at random.

    Raises:
        ValueError: naming the first weight that is missing, of another shape or not finite, but for those that ``is_new`` allows.
    """
    model, info = loaded
    gaps = dict.fromkeys(info["missing_keys"], "is missing")
    for name, found, wanted in info["mismatched_keys"]:
        gaps[name] = f"has shape {list(found)} and config.json asks for {list(wanted)}"
    unfilled = sorted(name for name in gaps if not is_new(name))
    if unfilled:
        raise ValueError(f"weight {unfilled[0]!r} {gaps[unfilled[0]]}, {len(unfilled)} such in all: give a whole model")
    for name, weight in model.named_parameters():
        if not is_new(name) and not bool(weight.detach().sum().isfinite()):
            raise ValueError(f"weight {name!r} holds NaN or infinity: give a model whose training went well")
    return model


def _make_savable(lm: Any) -> None:
    """Older models say temperature or top_p and not do_sample, which transformers loads and refuses to save."""
    if lm.can_generate():
        try:
            lm.generation_config.validate(strict=True)
        except ValueError:
            lm.generation_config.do_sample = True
            lm.generation_config.validate(strict=True)


def _unreadable(path: str, what: str, error: Exception) -> UserError:
    missing = "no such folder, and no such model on the hub; give the path of a model folder"
    reason = in_short(error) if Path(path).is_dir() else missing
    return UserError(f"model.path = {path!r}: no {what} could be loaded ({reason})")


def in_short(error: Exception) -> str:
    """What an exception of a library says, as a part of one sentence."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return reason if len(reason) < 200 else reason[:200] + "..."
