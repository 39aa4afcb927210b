"""Task settings: every wrong one is refused in one line that names the field, and every field is a flag."""

from typing import Any

import pytest

from rlvr.errors import ConfigError
from rlvr.tasks import TaskConfig, load_task


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"task": "chain_sums"}, "task='chain_sums' is not known; did you mean chain_sum"),
        ({"task": "gsm8"}, "task='gsm8' is not known; did you mean gsm8k"),
        ({"task": "reasoning_gym:gsm8k"}, "task='reasoning_gym:gsm8k' is not known"),
        ({"task": "./rows.txt"}, "task='./rows.txt' is not a file of a known type"),
        ({"task_kwargs": {"max_term": 2}}, "task_kwargs='max_term' is not known; did you mean max_terms"),
        ({"task_kwargs": {"max_terms": 1}}, "task_kwargs=.*refused by chain_sum: max_terms must be"),
        ({"task_kwargs": {"seed": 1}}, "task_kwargs=.*task_seed"),
        ({"task_kwargs": "{max_terms: 2}"}, "task_kwargs=.*not JSON"),
        ({"task_kwargs": "[1]"}, "task_kwargs=.*must be a mapping"),
        ({"task": "gsm8k", "task_kwargs": {"a": 1}}, "task_kwargs=.*takes none: remove"),
        ({"train_size": 0}, "train_size=0 must be"),
        ({"heldout_size": -1}, "heldout_size=-1 must be"),
        ({"num_shots": 1.5}, "num_shots=1.5 must be"),
        ({"task_seed": -1}, "task_seed=-1 must be"),
        ({"verifier_workers": 0}, "verifier_workers=0 must be"),
        ({"verifier_timeout": 0.0}, "verifier_timeout=0.0 must be"),
        ({"verifier_timeout": float("nan")}, "verifier_timeout=nan must be"),
        ({"prompt_template": "Q:"}, r"prompt_template='Q:' has no \{question\}"),
        ({"prompt_template": "{question} \\boxed{}"}, "prompt_template=.*double other braces"),
        ({"answer_template": "{question}"}, "answer_template=.*double other braces"),
        ({"reward": "math_verifi"}, "reward='math_verifi' is not known; did you mean math_verify"),
        ({"reward": "no_such_module:f"}, "reward='no_such_module:f' cannot be imported"),
        ({"prompt_column": "p"}, "prompt_column='p' has no meaning for the generated task"),
        ({"task": "a.parquet", "heldout_split": "test"}, "heldout_split='test' names a hub split"),
        ({"task": "a.parquet", "data_files": "b.parquet"}, "data_files='b.parquet' and task='a.parquet'"),
    ],
)
def test_config_errors_name_the_field(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        TaskConfig(**{"task": "chain_sum", **settings})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"task": "missing.parquet"}, "task='missing.parquet' names no file"),
        ({"task": "gsm8k", "data_files": "missing.jsonl"}, "data_files='missing.jsonl' names no file"),
        ({"task": "gsm8k", "data_files": "rows.xml"}, "data_files='rows.xml' is not a file of a known type"),
        ({"task": "gsm8k"}, "openai/gsm8k.*cannot be loaded.*give data_files a local copy"),
    ],
)
def test_missing_data_errors_name_the_field(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_task(TaskConfig(**settings))


def test_config_fields_are_flags_beside_those_of_trl() -> None:
    from transformers import HfArgumentParser
    from trl import GRPOConfig, ModelConfig

    parser = HfArgumentParser([TaskConfig, GRPOConfig, ModelConfig])  # a field of two classes is an error here
    arguments = ["--task", "chain_sum", "--task_kwargs", '{"max_terms": 3}', "--chat", "true", "--output_dir", "x"]
    config = parser.parse_args_into_dataclasses([*arguments, "--use_cpu", "--no_binary_reward"])[0]
    assert (config.task_kwargs, config.chat, config.binary_reward) == ({"max_terms": 3}, True, False)
