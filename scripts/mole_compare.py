"""Mixtures of LoRA experts against LoRA at equal trainable parameters: supervised, on several tasks at once.

    python scripts/mole_compare.py [--seeds 0 1 2] [--steps 100] [--methods lora dynmole]

SmolLM2-135M-Instruct learns a mixture of reasoning-gym tasks from solved rows; what counts is the share of held-out
problems that the greedy answer solves, by the tasks' own verifiers. A finished run is kept in runs/mole/ and not
repeated; the table of all runs there is printed and written to runs/mole/table.md.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from rlvr.errors import ConfigError
from rlvr.mole.model import MoleConfig
from rlvr.tasks import TaskConfig, load_task
from rlvr.tasks.load import Task
from rlvr.trainers.sft import SFTConfig, SFTTrainer, demonstrations

ROOT = Path(__file__).resolve().parents[1]
MODEL, RUNS = Path("models/SmolLM2-135M-Instruct"), Path("runs/mole")
TARGETS = ["gate_proj", "up_proj", "down_proj"]
# Of each task an equal share; short ones, since prompts are most of the work.
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 30},
    "letter_counting": {"min_words": 1, "max_words": 2},
    "lcm": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 30},
    "spell_backward": {"min_word_len": 3, "max_word_len": 4},
}
DYNMOLE = {"name": "dynmole"}
# 6 experts of rank 4 with their routers are 5.05 M numbers, LoRA of rank 27 is 5.13 M, 8 experts of rank 3 are 5.21 M.
METHODS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=27, lora_alpha=54, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"),
    **{
        name: MoleConfig(
            r=24 // experts,
            lora_alpha=2 * 24 // experts,
            lora_dropout=0.0,
            num_experts=experts,
            router=router,
            target_modules=TARGETS,
            task_type="CAUSAL_LM",
        )
        for name, experts, router in (
            ("mola-top-2", 6, {"name": "top_k", "k": 2, "balance_coef": 0.0}),
            ("mixlora", 8, {"name": "top_k", "k": 2, "balance_coef": 0.001}),
            ("dynmole", 6, DYNMOLE),
            ("dynmole-no-auxiliary-loss", 6, {**DYNMOLE, "entropy_coef": 0.0, "balance_coef": 0.0}),
            ("dynmole-no-hybrid-routing", 6, {**DYNMOLE, "threshold": 1.0}),
        )
    },
}


def mixture() -> Task:
    entries = [
        {"task": name, "task_kwargs": kwargs, "share": 1 / len(TASKS), "prompt_template": "{question}\nAnswer:"}
        for name, kwargs in TASKS.items()
    ]
    return load_task(
        TaskConfig(stages=[{"steps": 1, "tasks": entries}], heldout_size=40, train_size=400, verifier_workers=1)
    )


def perform(method: str, seed: int, steps: int, task: Task) -> None:
    """Train and measure; the result is the last thing that is written."""
    out = RUNS / f"{method}-seed{seed}-{steps}"
    if (out / "result.json").exists():
        return
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16), METHODS[method])
    args = SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=8,
        max_steps=steps,
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    rows = demonstrations(task.train)
    trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    told = {name: value for name, value in logs[-1].items() if name.startswith("router/")}
    result = {
        "method": method,
        "seed": seed,
        "steps": steps,
        "trained": model.get_nb_trainable_parameters()[0],
        "loss": logs[-1]["loss"],
        "seconds": trainer.state.log_history[-1]["train_runtime"],
        "router": told,
        "accuracy": accuracy(model, tokenizer, task),
    }
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, task: Task) -> dict[str, float]:
    """Share of the held-out problems that are solved greedily, by task."""
    assert task.heldout is not None
    model.eval()
    solved: dict[str, list[float]] = {name: [] for name in TASKS}
    for start in range(0, len(task.heldout), 40):
        rows = task.heldout.select(range(start, min(start + 40, len(task.heldout))))
        inputs = tokenizer(list(rows["prompt"]), return_tensors="pt", padding=True).to(model.device)
        ids: Tensor = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
        columns = {name: list(rows[name]) for name in rows.column_names if name != "prompt"}
        scores = task.reward(prompts=list(rows["prompt"]), completions=texts, **columns)
        for domain, score in zip(rows["domain"], scores, strict=True):
            solved[domain].append(float(score or 0.0))
    return {name: fmean(found) for name, found in solved.items()}


def table(results: list[Mapping[str, Any]]) -> str:
    """Markdown, a line per method: means over seeds; ± is the standard deviation of the mean over tasks."""
    lines = [
        f"| method | trained | seeds | {' | '.join(TASKS)} | mean | s per step | soft | experts |",
        "|---|---|---|" + "---|" * (len(TASKS) + 4),
    ]
    for method in METHODS:
        mine = [result for result in results if result["method"] == method]
        if not mine:
            continue
        means = [fmean(one["accuracy"].values()) for one in mine]
        spread = f" ± {stdev(means):.3f}" if len(means) > 1 else ""
        told = [
            f"{fmean(one['router'][name] for one in mine):.2f}" if mine[0]["router"] else ""
            for name in ("router/soft", "router/experts")
        ]
        cells = [
            method,
            f"{mine[0]['trained'] / 1e6:.2f} M",
            str(len(mine)),
            *(f"{fmean(one['accuracy'][name] for one in mine):.3f}" for name in TASKS),
            f"{fmean(means):.3f}{spread}",
            f"{fmean(one['seconds'] / one['steps'] for one in mine):.2f}",
            *told,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of 8 rows each")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    os.chdir(ROOT)
    logging.disable_progress_bar()
    subprocess.run([sys.executable, "scripts/smollm2.py", str(MODEL)], check=True)
    task = mixture()
    for seed in arguments.seeds:
        for method in arguments.methods:
            perform(method, seed, arguments.steps, task)
    found = [json.loads(path.read_text()) for path in sorted(RUNS.glob(f"*-{arguments.steps}/result.json"))]
    text = table(found)
    (RUNS / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
