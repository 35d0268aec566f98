"""Benchmarks: one file each, discovered automatically."""

from __future__ import annotations

from tnlm.evaluation.tasks.base import Answer, Row, Scores, Task, TaskMetric, multiple_choice
from tnlm.utils.registry import Registry

__all__ = [
    "Answer",
    "Row",
    "Scores",
    "Task",
    "TaskMetric",
    "get_task",
    "list_tasks",
    "multiple_choice",
    "tasks",
]

TASKS: Registry[Task] = Registry(__name__, "TASK", "task")


def tasks() -> dict[str, Task]:
    """Return every task by name.

    Example:
        >>> tasks()["gsm8k"].num_fewshot
        5
    """
    return TASKS.all()


def list_tasks() -> list[str]:
    """Return the names of all tasks that :func:`tnlm.evaluate` knows.

    Example:
        >>> "arc_easy" in list_tasks()
        True
    """
    return sorted(tasks())


def get_task(name: str) -> Task:
    """Return a task by name.

    Raises:
        OptionError: if the name is unknown.
    """
    return TASKS.get(name)
