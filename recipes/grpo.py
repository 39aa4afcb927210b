"""Fine-tune a Hugging Face model with entropy-controlled GRPO.

    accelerate launch recipes/grpo.py --config recipes/kl_cov.yaml --learning_rate 2e-6

Every field of TaskConfig, GRPOConfig and TRL's ModelConfig is a key of the YAML and a flag.
"""

from rlvr import GRPOConfig, GRPOTrainer
from rlvr.trainers.launch import launch

if __name__ == "__main__":
    launch(GRPOConfig, GRPOTrainer)
