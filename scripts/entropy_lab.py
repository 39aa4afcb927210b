"""A small laboratory: entropy collapse, and what holds it, in minutes on one CPU core.

    python scripts/entropy_lab.py base                          the base model and what it can do
    python scripts/entropy_lab.py collapse --seeds 0 1 2        plain GRPO
    python scripts/entropy_lab.py covariance --seeds 0 1 2      Clip-Cov and KL-Cov
    python scripts/entropy_lab.py thermostat --seeds 0 1 2      entropy held in a band, against constant bonuses
    python scripts/entropy_lab.py critic --seeds 0 1 2          PPO's critics against GRPO's groups

Runs are kept in runs/lab/ and not repeated. A run is 100 rollouts, 400 optimizer steps of `rlvr`'s trainers.
"""

import argparse
import os
import sys
from pathlib import Path

# One thread that sleeps while it waits: results repeat exactly, and several processes do not fight over the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from lab.base import BaseSettings, base_model
from lab.experiments import EXPERIMENTS, conduct
from transformers.utils import logging

from rlvr.errors import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=["base", *EXPERIMENTS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    os.chdir(Path(__file__).resolve().parents[1])
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    base = base_model(BaseSettings())
    if arguments.experiment == "base":
        print((base / "lab.json").read_text())
    else:
        print(conduct(arguments.experiment, arguments.seeds, base))


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
