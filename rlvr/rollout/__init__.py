"""Rollout engines: completions and the log-probs they were sampled with."""
