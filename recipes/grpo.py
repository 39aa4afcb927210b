"""Fine-tune a Hugging Face model with entropy-controlled GRPO.

    accelerate launch recipes/grpo.py --config recipes/kl_cov.yaml --learning_rate 2e-6

Every field of TaskConfig, GRPOConfig and TRL's ModelConfig is a key of the YAML and a flag.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict

import torch
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from rlvr import GRPOConfig, GRPOTrainer
from rlvr.errors import ConfigError
from rlvr.monitor.recorder import check_run_dir
from rlvr.monitor.report import write_report
from rlvr.monitor.summary import format_summary, summarize
from rlvr.tasks import TaskConfig, load_task
from rlvr.trainers.resume import resolve_checkpoint


def main(argv: Sequence[str] | None = None) -> None:
    parser = TrlParser((TaskConfig, GRPOConfig, ModelConfig))
    arguments = flag_values(sys.argv[1:] if argv is None else list(argv))
    task_config, args, model_config = parser.parse_args_and_config(arguments)
    train(task_config, args, model_config)


def train(task_config: TaskConfig, args: GRPOConfig, model_config: ModelConfig) -> None:
    """Check, load, measure, train, measure again, save, report."""
    output_dir = str(args.output_dir)
    checkpoint = resolve_checkpoint(output_dir, args.resume_from_checkpoint)
    if os.environ.get("RANK", "0") == "0":
        check_run_dir(output_dir, resume=checkpoint is not None)
    if not model_config.model_name_or_path:
        raise ConfigError("model_name_or_path is not set: give a Hugging Face model name or a checkpoint's directory")
    task = load_task(task_config)
    args.model_init_kwargs = model_arguments(args, model_config)
    args.eval_on_start = task.heldout is not None and checkpoint is None
    trainer = GRPOTrainer(
        model_config.model_name_or_path,
        task.reward,
        args,
        task.train,
        task.heldout,
        quantization_config=get_quantization_config(model_config),
        peft_config=get_peft_config(model_config),
        task_description=task.describe,
        run_config={**asdict(task_config), **asdict(model_config)},
    )
    with closing(trainer):
        trainer.train(resume_from_checkpoint=checkpoint)
        if task.heldout is not None:
            trainer.evaluate()
        trainer.save_model(f"{output_dir}/model")
        if trainer.is_world_process_zero():
            print(format_summary(summarize(output_dir)))
            print(f"report      {write_report(output_dir)}\ncheckpoint  {output_dir}/model")


def model_arguments(args: GRPOConfig, model_config: ModelConfig) -> dict[str, object]:
    """How the model is loaded, as in TRL's own scripts."""
    arguments = {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
        **(args.model_init_kwargs or {}),
    }
    return {name: value for name, value in arguments.items() if value is not None}


def flag_values(argv: list[str]) -> list[str]:
    """`--resume_from_checkpoint` alone means the newest checkpoint."""
    flag = "--resume_from_checkpoint"
    if flag in argv:
        after = argv.index(flag) + 1
        if after == len(argv) or argv[after].startswith("--"):
            argv.insert(after, "latest")
    return argv


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
