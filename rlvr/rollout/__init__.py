"""Rollout engines, the weights they are given, and how far their log-probs are from the trainer's."""
