"""Trainers on TRL, and the one place that knows its names."""
