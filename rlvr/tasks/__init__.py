"""Verifiable tasks: prompts with answers a program can check, and the reward function that checks them."""

from rlvr.tasks.config import TaskConfig
from rlvr.tasks.load import Task, load_task

__all__ = ["Task", "TaskConfig", "load_task"]
