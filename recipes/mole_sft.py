"""Fine-tune a Hugging Face model on the solved rows of a task: a mixture of LoRA experts, LoRA, or all weights.

    accelerate launch recipes/mole_sft.py --config recipes/mole_sft.yaml --learning_rate 1e-4

Every field of TaskConfig, rlvr.trainers.sft.SFTConfig and TRL's ModelConfig is a key of the YAML and a flag.
"""

from rlvr.trainers.launch import launch_sft

if __name__ == "__main__":
    launch_sft()
