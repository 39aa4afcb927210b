"""What a policy's tokenizer must have, and which prompts do not fit, seen before the model is loaded."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer

from rlvr.errors import ConfigError
from rlvr.trainers.engine import DEFAULT_MODEL_LENGTH

TEMPLATE_TOKENS = 512  # at most what a chat template adds: prompts further from the limit are not tokenized


def check_tokens(model: Any, processing_class: Any, args: Any, datasets: Mapping[str, Dataset | None]) -> None:
    """model, processing_class, args: as the trainer gets them.   datasets: by the name of the trainer's argument.

    Raises: ConfigError for a tokenizer without an end-of-sequence token, or for a prompt beside which there is no room
    for a completion.
    """
    name = model if isinstance(model, str) else model.config._name_or_path
    known = {"trust_remote_code": args.trust_remote_code, "revision": (args.model_init_kwargs or {}).get("revision")}
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    try:
        config = AutoConfig.from_pretrained(name, **known) if isinstance(model, str) else model.config
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(name, **known)
    except (OSError, ValueError, KeyError):
        return  # whoever loads it says what is wrong
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model_name_or_path={name!r}: its tokenizer has no eos_token, so no completion can end: set eos_token in "
            "tokenizer_config.json, or pass a processing_class that has one"
        )
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if args.use_vllm and args.device.type != "cuda":
        limit = min(limit or DEFAULT_MODEL_LENGTH, DEFAULT_MODEL_LENGTH)
    if args.use_vllm:
        limit = args.vllm_max_model_length or limit
    if limit is None:
        return
    for label, dataset in datasets.items():
        if isinstance(dataset, Dataset) and "prompt" in dataset.column_names:
            _check_prompts(label, dataset["prompt"], tokenizer, limit - args.max_completion_length, args)


def _check_prompts(label: str, prompts: Any, tokenizer: Any, room: int, args: Any) -> None:
    long = list(_too_long(prompts, tokenizer, room))
    if not long:
        return
    number, tokens = long[0]
    told = (
        f"{label}: {len(long)} prompts are too long, the first in row {number} with {tokens} tokens: beside "
        f"max_completion_length={args.max_completion_length} there is room for {room}; remove them, or lower "
        "max_completion_length"
    )
    if not args.use_vllm:  # some models go on beyond the positions that they were made for
        warnings.warn(told, stacklevel=5)
        return
    raise ConfigError(f"{told}, or raise vllm_max_model_length if that is the limit")


def _too_long(prompts: Any, tokenizer: Any, room: int) -> Iterator[tuple[int, int]]:
    """Rows, counted from 1, and their numbers of tokens. A token is a byte at least: most need no tokenizer."""
    numbers, texts, templated = [], [], False
    for number, prompt in enumerate(prompts, 1):
        parts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        if not all(isinstance(part, str) for part in parts):  # images
            continue
        if sum(len(part.encode(errors="replace")) for part in parts) + TEMPLATE_TOKENS <= room:
            continue
        templated = not isinstance(prompt, str)  # all rows of a column are of one kind
        if templated:
            prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        numbers.append(number)
        texts.append(prompt)
    found = tokenizer(texts, add_special_tokens=not templated)["input_ids"] if texts else []
    for number, ids in zip(numbers, found, strict=True):
        if len(ids) > room:
            yield number, len(ids)
