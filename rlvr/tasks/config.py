"""What a user says about a task, and every check of it that needs no data."""

import json
import math
import string
from dataclasses import dataclass, field, fields
from typing import Any

from rlvr.errors import ConfigError, unknown
from rlvr.tasks.names import gym_config_class, resolve
from rlvr.tasks.schedule import Entries, Stage, parse_stages
from rlvr.verifier_fence import Limits
from rlvr.verifiers import import_verifier

TEMPLATE_FIELDS = {"prompt_template": "question", "answer_template": "answer"}


@dataclass
class TaskConfig:
    """A verifiable task, or several in stages. Every field is a command-line flag of the recipes and a key of their
    YAML files.

    Raises: ConfigError naming the field, its value and the fix; nothing is loaded before all fields are checked.
    """

    task: str = field(
        default="",
        metadata={
            "help": "A reasoning-gym task (`chain_sum` or `reasoning_gym:chain_sum`), gsm8k, math_500, dapo_math_17k, "
            "a local .parquet/.json/.jsonl/.csv file, or a hub dataset `owner/name`. verl's columns are recognized."
        },
    )
    stages: list[Any] | str | None = field(
        default=None,
        metadata={
            "help": "Instead of task: what is trained on in turn, as YAML or JSON. An entry is {steps: 300, task: x} "
            "or, for a mixture, {steps: 200, tasks: [{task: x, share: 0.7}, {task: y, share: 0.3}]}, with any "
            "setting of a task and a name for it, domain. Settings beside stages are the entries' defaults."
        },
    )
    task_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Settings of the reasoning-gym task, as JSON or YAML: its difficulty."}
    )
    data_files: str | None = field(
        default=None, metadata={"help": "A local file (or glob) to read a named or hub task from instead of the hub."}
    )
    task_split: str | None = field(default=None, metadata={"help": "Hub split to train on. Default: the task's own."})
    heldout_split: str | None = field(
        default=None,
        metadata={"help": "Hub split for held-out rows. Default: the task's own test split, else rows of task_split."},
    )
    prompt_column: str | None = field(
        default=None,
        metadata={"help": "Column of the question: text or a list of messages. Default: prompt, question or problem."},
    )
    answer_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the reference answer; a dot reaches into a struct. Default: answer, ground_truth, or "
            "reward_model.ground_truth in verl's layout."
        },
    )
    train_size: int | None = field(
        default=None,
        metadata={"help": "Number of training prompts. Default: all rows; up to 2,000 for reasoning-gym."},
    )
    heldout_size: int = field(
        default=128, metadata={"help": "Number of held-out prompts, none of them a training prompt; 0 for none."}
    )
    task_seed: int = field(default=0, metadata={"help": "Seed of the task's generation and of the choice of rows."})
    num_shots: int = field(
        default=0, metadata={"help": "Solved examples in every prompt, from rows that are neither train nor held-out."}
    )
    prompt_template: str | None = field(
        default=None, metadata={"help": "str.format template of one question, with {question}. Default: by task."}
    )
    answer_template: str | None = field(
        default=None, metadata={"help": "str.format template of one solved example's answer, with {answer}."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message of a chat prompt; leading paragraph of a plain one."}
    )
    chat: bool | None = field(
        default=None,
        metadata={
            "help": "Prompts as messages, so that the tokenizer's chat template is applied (true), or as plain text "
            "(false). Default: messages if the data has messages, else plain text."
        },
    )
    reward: str = field(
        default="auto",
        metadata={
            "help": "auto (reasoning-gym's own verifier, math_verify for the rest), math_verify, or module:function, "
            "a verifier f(completion: str, answer: str, **row) -> float that runs in the worker processes."
        },
    )
    binary_reward: bool = field(
        default=True,
        metadata={"help": "reasoning-gym only: 1 iff its score is at least 1, else 0. False keeps partial credit."},
    )
    verifier_timeout: float = field(default=10.0, metadata={"help": "Seconds one verification may take."})
    verifier_workers: int = field(
        default=4, metadata={"help": "Verifier processes per rank, whatever the number of tasks."}
    )
    verifier_limits: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "What a verifier process may take, as JSON or YAML; by default {memory_gib: 8, file_mib: 64, "
            "processes: 64, environment: []}. null is no limit; environment lists the variables that a verifier sees. "
            "A fence, not a sandbox: docs/security.md."
        },
    )

    def __post_init__(self) -> None:
        self.task_kwargs = self._mapping("task_kwargs", '{"max_terms": 2}')
        self.verifier_limits = self._mapping("verifier_limits", '{"memory_gib": 16}')
        self.limits = Limits.parse(self.verifier_limits)
        self._check_numbers()
        self._check_templates()
        self.schedule: tuple[Stage, ...] = () if self.stages is None else self._parsed_stages()
        if not self.schedule:
            self._check_task()

    def _parsed_stages(self) -> tuple[Stage, ...]:
        if self.task:
            raise ConfigError(
                f"task={self.task!r} and stages both say what is trained on: remove one (as a flag: --task '')"
            )
        defaults = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "stages"}
        return parse_stages(self.stages, Entries(TaskConfig, defaults))

    def _check_task(self) -> None:
        if not self.task:
            raise ConfigError("task is not set: name a task, or give stages")
        source = resolve(self.task)
        for name in ("data_files", "task_split", "heldout_split", "prompt_column", "answer_column"):
            if source.kind == "gym" and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} has no meaning for the generated task {self.task!r}: remove it"
                )
        local = source.kind == "file" or self.data_files is not None
        for name in ("task_split", "heldout_split"):
            if local and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} names a hub split but the data is a local file: remove it"
                )
        if source.kind == "file" and self.data_files is not None:
            raise ConfigError(f"data_files={self.data_files!r} and task={self.task!r} both name files: give one")
        self._check_task_kwargs(source.name if source.kind == "gym" else None)
        self._check_reward()

    def _mapping(self, name: str, example: str) -> dict[str, Any]:
        value = given = getattr(self, name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{name}={given!r} is not JSON ({error}): write e.g. '{example}'") from None
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{name}={given!r} must be a mapping, e.g. {example}")
        return dict(value or {})

    def _check_numbers(self) -> None:
        least = {"train_size": 1, "heldout_size": 0, "task_seed": 0, "num_shots": 0, "verifier_workers": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if name == "train_size" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name}={value!r} must be an integer of at least {low}")
        timeout = self.verifier_timeout
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
            raise ConfigError(f"verifier_timeout={timeout!r} must be a number of seconds above 0, e.g. 10")

    def _check_templates(self) -> None:
        for name, slot in TEMPLATE_FIELDS.items():
            template = getattr(self, name)
            if template is None:
                continue
            try:
                slots = {part for _, part, _, _ in string.Formatter().parse(template) if part is not None}
                template.format(**{slot: ""})
            except (ValueError, KeyError, IndexError, AttributeError) as error:
                raise ConfigError(
                    f"{name}={template!r} is not a str.format template of {{{slot}}} ({error!r}): double other braces"
                ) from None
            if slot not in slots:
                raise ConfigError(f"{name}={template!r} has no {{{slot}}}: add it where the {slot} goes")

    def _check_task_kwargs(self, gym_name: str | None) -> None:
        kwargs = self.task_kwargs
        assert isinstance(kwargs, dict)
        if gym_name is None:
            if kwargs:
                raise ConfigError(
                    f"task_kwargs={kwargs!r} are for reasoning-gym tasks; task={self.task!r} takes none: remove them"
                )
            return
        for key, instead in {"seed": "task_seed", "size": "train_size and heldout_size"}.items():
            if key in kwargs:
                raise ConfigError(f"task_kwargs={{{key!r}: {kwargs[key]!r}}} is set by {instead}: use that")
        config_class = gym_config_class(gym_name)
        known = [f.name for f in fields(config_class) if f.name not in ("seed", "size")]
        for key in kwargs:
            if key not in known:
                raise unknown("task_kwargs", key, known)
        try:
            config_class(**kwargs).validate()
        except Exception as error:  # reasoning-gym asserts, but a wrong type may fail anywhere
            raise ConfigError(
                f"task_kwargs={kwargs!r} is refused by {gym_name}: {error or type(error).__name__}"
            ) from None

    def _check_reward(self) -> None:
        if ":" in self.reward:
            import_verifier(self.reward)
        elif self.reward not in ("auto", "math_verify"):
            raise unknown("reward", self.reward, ["auto", "math_verify", "module:function"])
