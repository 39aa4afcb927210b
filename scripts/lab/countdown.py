"""Countdown: reach a target from three numbers in two written steps. Every number is one token, the verdict exact.

prompt      7 3 12 > 22 :
completion  7 + 3 = 10 10 + 12 = 22 <eos>

Two numbers make the same task with one step, so that lengths vary where both are mixed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

LARGEST_NUMBER, LARGEST_RESULT = 15, 99
OPERATIONS = ("+", "-", "*")
PAD, EOS = "<pad>", "<eos>"
VOCABULARY = (*(str(n) for n in range(100)), *OPERATIONS, "=", ">", ":", PAD, EOS)
IDS = {word: number for number, word in enumerate(VOCABULARY)}
COMPLETION_LENGTH = 11  # with three numbers
HELD_OUT = 10  # one problem in so many


@dataclass(frozen=True, slots=True)
class Solutions:
    """Problems, each with one of its solutions.

    numbers [S, n]: as given.   steps [S, n - 1, 4]: left, operation, right, result; the last result is the target.
    """

    numbers: NDArray[np.int64]
    steps: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: NDArray[np.generic]) -> "Solutions":
        return Solutions(self.numbers[rows], self.steps[rows])

    @property
    def targets(self) -> NDArray[np.int64]:
        return self.steps[:, -1, -1]

    def prompts(self) -> list[str]:
        pairs = zip(self.numbers.tolist(), self.targets.tolist(), strict=True)
        return [f"{' '.join(map(str, numbers))} > {target} :" for numbers, target in pairs]

    def completions(self) -> list[str]:
        def written(step: list[int]) -> str:
            left, operation, right, result = step
            return f"{left} {OPERATIONS[operation]} {right} = {result}"

        return [f"{' '.join(map(written, steps))} {EOS}" for steps in self.steps.tolist()]


@cache
def all_solutions(numbers: int = 3) -> Solutions:
    """Every sound computation there is: uniform draws from it are problems with a demonstration.

    All numbers (1 to 15; two or three of them) are used once, results lie in 1 to 99, and nothing is multiplied by 1.
    """
    pool, steps = _pairs() if numbers == 2 else _triples()
    a, op, b, c = np.moveaxis(steps, 2, 0)
    sound = (c >= 1) & (c <= LARGEST_RESULT) & ~((op == 2) & ((a == 1) | (b == 1)))
    return Solutions(pool, steps)[sound.all(axis=1)]


def _pairs() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    given = np.arange(1, LARGEST_NUMBER + 1)
    first, second, operation, swap = (
        x.reshape(-1) for x in np.meshgrid(given, given, range(3), range(2), indexing="ij")
    )
    left, right = np.where(swap, second, first), np.where(swap, first, second)
    steps = np.stack([left, operation, right, _apply(left, operation, right)], 1)[:, None]
    return np.stack([first, second], 1), steps


def _triples() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    given = np.arange(1, LARGEST_NUMBER + 1)
    choices = np.meshgrid(given, given, given, range(3), range(2), range(3), range(3), range(2), indexing="ij")
    *numbers, i, skip, op1, op2, swap = (axis.reshape(-1) for axis in choices)
    pool = np.stack(numbers, 1)
    row = np.arange(len(pool))
    j = (i + 1 + skip) % 3
    left, right, rest = pool[row, i], pool[row, j], pool[row, 3 - i - j]
    first = _apply(left, op1, right)
    second_left, second_right = np.where(swap, rest, first), np.where(swap, first, rest)
    second = _apply(second_left, op2, second_right)
    steps = np.stack(
        [np.stack([left, op1, right, first], 1), np.stack([second_left, op2, second_right, second], 1)], 1
    )
    return pool, steps


@cache
def split(held_out: bool, numbers: int = 3) -> Solutions:
    """The solutions of the held-out or of the training problems; the order of the numbers makes no other problem."""
    solutions = all_solutions(numbers)
    key = solutions.targets * 7919
    for number in np.sort(solutions.numbers, axis=1).T:
        key = (key * 31 + number) % 1_000_003
    return solutions[(key % HELD_OUT == 0) == held_out]


def draw_prompts(held_out: bool, counts: Sequence[int], size: int, rng: np.random.Generator) -> list[str]:
    """`size` prompts; with several counts of numbers, each prompt's count is drawn, all alike likely."""
    if len(counts) == 1:
        return draw(split(held_out, counts[0]), size, rng).prompts()
    of_each = {n: iter(draw(split(held_out, n), size, rng).prompts()) for n in counts}
    return [next(of_each[int(n)]) for n in rng.choice(counts, size)]


def distinct_problems(prompts: Sequence[str]) -> int:
    """How many there are among the prompts, of which several may be one problem with its numbers in another order."""
    problems = [prompt.split() for prompt in prompts]
    return len({(*sorted(numbers), target) for *numbers, _arrow, target, _colon in problems})


def draw(solutions: Solutions, count: int, rng: np.random.Generator) -> Solutions:
    """`count` uniform draws with replacement, so a problem with many solutions comes often."""
    return solutions[rng.integers(len(solutions), size=count)]


def verify(words: Sequence[str], numbers: Sequence[int], target: int) -> float:
    """1 if the completion is right, else 0: sound steps that use every number once, reach the target and end.

    words: of the completion, its end token included.
    """
    steps = len(numbers) - 1
    if len(words) != 5 * steps + 1 or words[-1] != EOS:
        return 0.0
    pool, result = list(numbers), None
    for start in range(0, 5 * steps, 5):
        left, operation, right, equals, written = words[start : start + 5]
        if operation not in OPERATIONS or equals != "=":
            return 0.0
        for word in (left, right):
            if not word.isdecimal() or int(word) not in pool:
                return 0.0
            pool.remove(int(word))
        result = int(_apply(int(left), OPERATIONS.index(operation), int(right)))
        if written != str(result):
            return 0.0
        pool.append(result)
    return float(result == target)


def reward(prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: object) -> list[float]:
    """The verdict on each completion, as a reward function of the trainer; what follows an end token is padding."""
    found = []
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        *numbers, _arrow, target, _colon = prompt.split()
        words = [VOCABULARY[i] for i in ids]
        end = words.index(EOS) + 1 if EOS in words else len(words)
        found.append(verify(words[:end], [int(number) for number in numbers], int(target)))
    return found


def _apply(left, operation, right):  # type: ignore[no-untyped-def]  # of integers or of arrays of them
    return np.where(operation == 0, left + right, np.where(operation == 1, left - right, left * right))
