"""The `main` of a recipe: read the YAML and the flags, check, load, train, evaluate, save, report."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftConfig
from transformers import AutoConfig
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from rlvr.errors import ConfigError, RunError, unknown
from rlvr.monitor.recorder import check_run_dir
from rlvr.monitor.report import write_report
from rlvr.monitor.summary import format_summary, summarize
from rlvr.tasks import TaskConfig, load_task
from rlvr.trainers.adapters import choose_adapter, policy_or_adapter
from rlvr.trainers.alert_fields import WEBHOOK
from rlvr.trainers.config import PolicyConfig
from rlvr.trainers.policy import PolicyTrainer
from rlvr.trainers.resume import resolve_checkpoint, restarts
from rlvr.trainers.sft import SFTConfig, SFTTrainer, solved_rows


def launch(config_class: type[PolicyConfig], trainer_class: type[PolicyTrainer]) -> None:
    """Run what the command line asks for; a ConfigError or a RunError is one line and exit status 1."""
    _run(lambda: train(trainer_class, *parse_arguments(config_class, sys.argv[1:])))


def launch_sft() -> None:
    """The same for supervised fine-tuning."""
    _run(lambda: train_sft(*parse_arguments(SFTConfig, sys.argv[1:])))


def _run(job: Callable[[], None]) -> None:
    try:
        job()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # a process that left early would break the others' last words
    except (ConfigError, RunError) as error:
        sys.exit(f"error: {error}")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def parse_arguments(config_class: type[Any], argv: Sequence[str]) -> tuple[TaskConfig, Any, ModelConfig]:
    """The task, an instance of `config_class` and the model, from a recipe's YAML and flags. Raises: ConfigError."""
    parser = TrlParser((TaskConfig, config_class, ModelConfig))
    arguments = flag_values(list(argv))
    check_names(parser, arguments)
    try:
        task_config, args, model_config = parser.parse_args_and_config(arguments)
    except ConfigError:
        raise
    except ValueError as error:  # what transformers and TRL say of their own fields
        raise ConfigError(" ".join(str(error).split())) from error
    check_command_line(args, argv)
    return task_config, args, model_config


def train(
    trainer_class: type[PolicyTrainer], task_config: TaskConfig, args: PolicyConfig, model_config: ModelConfig
) -> None:
    """Check, load, measure, train, measure again, save, report."""
    output_dir = str(args.output_dir)
    checkpoint = resolve_checkpoint(output_dir, args.resume_from_checkpoint)
    if os.environ.get("RANK", "0") == "0":
        check_run_dir(output_dir, resume=checkpoint is not None or restarts(args.resume_from_checkpoint))
    check_model(model_config)
    choose_adapter(args, get_peft_config(model_config))
    task = load_task(task_config)
    args.model_init_kwargs = model_arguments(args, model_config)
    args.eval_on_start = task.heldout is not None and checkpoint is None
    trainer = trainer_class(
        policy_or_adapter(model_config, args),
        task.reward,
        args,
        task.train,
        task.heldout,
        quantization_config=get_quantization_config(model_config),
        peft_config=get_peft_config(model_config),
        run_config={**asdict(task_config), **asdict(model_config), "task_description": task.describe},
        schedule=task.schedule,
    )
    with closing(trainer):
        trainer.train(resume_from_checkpoint=checkpoint if checkpoint is not None else args.resume_from_checkpoint)
        try:
            if task.heldout is not None:
                trainer.evaluate()
            trainer.export(f"{output_dir}/model")
        except BaseException as error:
            trainer.run_callback.fail(error)
            raise
        if trainer.is_world_process_zero():
            print(format_summary(summarize(output_dir)))
            print(f"report      {_report(output_dir)}\ncheckpoint  {output_dir}/model")


def _report(output_dir: str) -> str:
    """Its path, or why there is none: a training that has come to its end does not fail of that."""
    try:
        return str(write_report(output_dir))
    except ConfigError as error:
        return f"not written: {error}"


def train_sft(task_config: TaskConfig, args: SFTConfig, model_config: ModelConfig) -> None:
    """Check, load, train, save."""
    check_model(model_config)
    choose_adapter(args, get_peft_config(model_config))
    task = load_task(task_config)
    train_rows, heldout_rows = solved_rows(task, task_config.answer_template)
    args.model_init_kwargs = model_arguments(args, model_config)
    trainer = SFTTrainer(
        policy_or_adapter(model_config, args),
        args=args,
        train_dataset=train_rows,
        eval_dataset=heldout_rows,
        quantization_config=get_quantization_config(model_config),
        peft_config=get_peft_config(model_config),
    )
    trainer.train(resume_from_checkpoint=resolve_checkpoint(str(args.output_dir), args.resume_from_checkpoint))
    trainer.save_model(f"{args.output_dir}/model")
    if trainer.is_world_process_zero():
        print(f"checkpoint  {args.output_dir}/model")


def model_arguments(args: Any, model_config: ModelConfig) -> dict[str, object]:
    """How the model is loaded, as in TRL's own scripts."""
    arguments = {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
        **(args.model_init_kwargs or {}),
    }
    return {name: value for name, value in arguments.items() if value is not None}


def check_command_line(args: Any, argv: Sequence[str]) -> None:
    """Refuse a secret in a command line that is sent away. Raises: ConfigError."""
    flags = {text.partition("=")[0].replace("-", "_") for text in argv if text.startswith("--")}
    if "__alert_webhook" in flags and "wandb" in args.report_to:
        raise ConfigError(
            "--alert_webhook=<hidden> is refused with report_to=wandb, which stores the command line: set the "
            f"environment variable {WEBHOOK}, or alert_webhook in the YAML"
        )


def check_names(parser: TrlParser, arguments: Sequence[str]) -> None:
    """Refuse an unknown key of the YAML or an unknown flag, with the nearest names, before anything is parsed."""
    known = {flag.removeprefix("--") for flag in parser._option_string_actions}
    given = [text.removeprefix("--").partition("=")[0] for text in arguments if text.startswith("--")]
    if "--config" in arguments[:-1]:
        path = arguments[list(arguments).index("--config") + 1]
        try:
            settings = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"config={path!r} cannot be read: {' '.join(str(error).split())}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:  # whose text may hold a secret
            mark = getattr(error, "problem_mark", None)
            why = f"line {mark.line + 1}, column {mark.column + 1} is no YAML" if mark else "it is no text in UTF-8"
            raise ConfigError(f"config={path!r} cannot be read: {why}") from None
        if not isinstance(settings, dict):
            raise ConfigError(f"config={path!r} holds no `key: value` lines")
        given += [str(key) for key in settings if key != "env"]
    for name in given:
        if name not in known | {"config"}:
            raise unknown("setting", name, known)


def check_model(model_config: ModelConfig) -> None:
    """Read the model's configuration, which is cheap, to refuse a wrong name or path before the data is loaded."""
    name = str(model_config.model_name_or_path or "")
    if not name:
        raise ConfigError("model_name_or_path is not set: give a Hugging Face model name or a checkpoint's directory")
    if (Path(name) / "adapter_config.json").is_file():
        name = str(PeftConfig.from_pretrained(name).base_model_name_or_path)
    try:
        AutoConfig.from_pretrained(name, revision=model_config.model_revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            return  # the trainer asks for it with the user's setting
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"model_name_or_path={name!r} is no model directory or hub name: {reason}") from error


def flag_values(argv: list[str]) -> list[str]:
    """`--resume_from_checkpoint` alone means the newest checkpoint."""
    flag = "--resume_from_checkpoint"
    if flag in argv:
        after = argv.index(flag) + 1
        if after == len(argv) or argv[after].startswith("--"):
            argv.insert(after, "latest")
    return argv
