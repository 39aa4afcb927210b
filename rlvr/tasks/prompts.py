"""From rows to prompts: templates, solved examples, plain text or messages."""

import string
from collections.abc import Sequence
from dataclasses import dataclass

from rlvr.errors import ConfigError
from rlvr.tasks.config import TaskConfig
from rlvr.tasks.rows import Row

Prompt = str | list[dict[str, str]]

PLAIN = ("Question: {question}\nAnswer:", " {answer}\n\n")
CHAT = {
    "math_verify": ("{question}\n\nPut your final answer in \\boxed{{}}.", "\\boxed{{{answer}}}"),
    "reasoning_gym": (
        "{question}\n\nGive your final answer between <answer> and </answer>.",
        "<answer>{answer}</answer>",
    ),
    "own": ("{question}", "{answer}"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFormat:
    """How a question becomes a prompt. A solved example is the prompt of its question followed by its answer."""

    prompt_template: str
    answer_template: str
    system_prompt: str | None
    chat: bool

    def build(self, row: Row, shots: Sequence[Row] = ()) -> Prompt:
        """The prompt of `row` after the solved `shots`. Raises: ConfigError where a row cannot be said this way."""
        if self.chat:
            return self._messages(row, shots)
        if row.messages is not None and len(row.messages) > 1:
            raise ConfigError(
                f"chat=False: a prompt has {len(row.messages)} messages and plain text holds one: set chat=true"
            )
        lead = f"{self.system_prompt}\n\n" if self.system_prompt else ""
        solved = "".join(self._ask(shot) + self._answer(shot) for shot in shots)
        return lead + solved + self._ask(row)

    @property
    def stop(self) -> str | None:
        """What the next example of a plain prompt starts with: a completion is cut there. None if unknown."""
        if self.chat:
            return None
        first = next(iter(string.Formatter().parse(self.prompt_template)))[0]
        return first.strip() or None

    def _ask(self, row: Row) -> str:
        return self.prompt_template.format(question=row.question)

    def _answer(self, row: Row) -> str:
        return self.answer_template.format(answer=row.answer)

    def _messages(self, row: Row, shots: Sequence[Row]) -> list[dict[str, str]]:
        before = [] if row.messages is None else row.messages[:-1]
        if self.system_prompt:
            if any(message["role"] == "system" for message in before):
                raise ConfigError(
                    f"system_prompt={self.system_prompt!r}: the data's prompts have a system message: remove one"
                )
            before = [{"role": "system", "content": self.system_prompt}, *before]
        solved: list[dict[str, str]] = []
        for shot in shots:
            solved.append({"role": "user", "content": self._ask(shot)})
            solved.append({"role": "assistant", "content": self._answer(shot)})
        return [*before, *solved, {"role": "user", "content": self._ask(row)}]


def choose_format(config: TaskConfig, verifier: str, has_messages: bool) -> PromptFormat:
    """The format a TaskConfig asks for, with the defaults of its verifier. Prompts that came as messages say already
    what they want, so they get no instruction."""
    chat = has_messages if config.chat is None else config.chat
    question, answer = CHAT.get(verifier, CHAT["own"]) if chat else PLAIN
    if chat and has_messages:
        question = "{question}"
    return PromptFormat(
        prompt_template=config.prompt_template or question,
        answer_template=config.answer_template or answer,
        system_prompt=config.system_prompt,
        chat=chat,
    )
