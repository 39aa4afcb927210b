"""A setting where entropy collapses within minutes on one CPU core: task, base model, runs, experiments."""
