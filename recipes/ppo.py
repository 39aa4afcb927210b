"""Fine-tune a Hugging Face model with entropy-controlled PPO: a critic gives every token an advantage of its own.

    accelerate launch recipes/ppo.py --config recipes/ppo.yaml --learning_rate 2e-6

Every field of TaskConfig, PPOConfig and TRL's ModelConfig is a key of the YAML and a flag.
"""

from rlvr import PPOConfig, PPOTrainer
from rlvr.trainers.launch import launch

if __name__ == "__main__":
    launch(PPOConfig, PPOTrainer)
