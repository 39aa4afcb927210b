"""Trainers on TRL, and the one place that knows its names."""

import warnings

# vLLM 0.32 is what rlvr is tested with; TRL's warning about it would greet every start.
warnings.filterwarnings("ignore", message="TRL currently supports vLLM")
