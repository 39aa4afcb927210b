"""What a rollout's groups earned: the completions of one prompt, which a run can meet again."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of one rollout, over all ranks, in its order. A run without groups has groups of one completion.

    prompts: texts; prompts that differ only in their images share a text, and hence an id.
    passed: completions that count as correct.   scored: completions that could be scored.
    reward: mean of these, NaN without any.
    Raises: ValueError if these differ in length.
    """

    prompts: Sequence[str]
    passed: Sequence[int]
    scored: Sequence[int]
    reward: Sequence[float]

    def __post_init__(self) -> None:
        sizes = {f.name: len(getattr(self, f.name)) for f in fields(self)}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"groups need one value each, got {sizes}")


def prompt_id(text: str) -> str:
    """The first 12 hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt as it is, or the messages of a conversation, with their roles if there are several."""
    if isinstance(prompt, str):
        return prompt
    contents = [_content(message.get("content")) for message in prompt]
    if len(contents) == 1:
        return contents[0]
    return "\n\n".join(f"{m.get('role')}: {content}" for m, content in zip(prompt, contents, strict=True))


def _content(content: Any) -> str:
    """Of a message; an image in it is `<image>`."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text") or f"<{part.get('type')}>" for part in content)
