"""Ends completions at a token that means "done" in a plain-text prompt, such as a newline after a few-shot answer.

A base model rarely emits its end token there: it goes on to invent the next question, which costs time, is trained on,
and counts as truncated.
"""

from typing import TYPE_CHECKING, Any

from rlvr.errors import ConfigError

if TYPE_CHECKING:
    from rlvr.trainers.policy import PolicyTrainer


def stop_token(tokenizer: Any, text: str) -> int:
    """The id of the single token that `text` is. Raises: ConfigError if it is several, which no engine can stop at."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ConfigError(f"stop={text!r} is {len(ids)} tokens of this tokenizer; it must be one, for example '\\n'")
    return int(ids[0])


def add_stop_token(trainer: "PolicyTrainer", text: str) -> None:
    """Make `text` an end token of every engine, and of what counts as a finished completion."""
    token = stop_token(trainer._tokenizer, text)
    trainer.eos_token_ids = [*trainer.eos_token_ids, token]
    if trainer.use_vllm:  # TRL's engine reads its settings at each call
        settings = trainer.vllm_generation.generation_kwargs
        settings["stop_token_ids"] = [*settings.get("stop_token_ids", []), token]
    else:
        trainer.generation_config.eos_token_id = trainer.eos_token_ids
        trainer.generation_kwargs["eos_token_id"] = trainer.eos_token_ids
