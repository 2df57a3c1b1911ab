"""Chained arithmetic modulo 23 over a small graph: a task whose steps can be checked exactly.

A prompt states values and asks for one of them; the solution works out what is needed, one step for each statement, and ends as GSM8K's do:

    a = 7 ; b = a * 3 ; d = a - 5 ; c = b + a ; ? c :
    b = a * 3 = 7 * 3 = 21 ; c = b + a = 21 + 7 = 5 ; #### 5

A step copies the whole expression, then its values, then gives the result; ` ;` ends it. K, the number of steps, is 1 to 6 and is the
difficulty. One statement (`d` above) is a distractor that no right solution works out. Every word is one token, so all problems of one K
have the same length.

Everything is a pure function of (seed, index, split). The splits are disjoint by structure: a problem's structure is everything but its
names and numbers (operators, which operand refers to which statement or is a literal, number of leaves, place and form of the distractor),
and the structure's hash decides the split that it belongs to. K = 1 has about 1,900 structures, larger K many more, so no number is needed
in the hash.

The shape of the task follows iGSM (Ye et al. 2024, 2407.20311: modulus 23, statements of a graph, distractors).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from hasten.rng import key, uniform

MODULUS = 23
MAX_STEPS = 6
NAMES = "abcdefghijkl"
OPERATORS = "+-*"
SPLITS = {"test": 1, "calibration": 1, "train": 8}  # shares of the structures, in tenths
SIZES = {"test": 2000, "calibration": 1000}
SEED = 23  # of the fixed test and calibration sets
HARD, HARD_SLIPS, SLIPS = 0.10, 0.6, 0.05  # share of the 1,587 facts x op y that are hard; how often those, and the others, slip

Operand = tuple[str, int]  # ("leaf", i), ("step", i) or ("literal", 0): what an operand refers to
Shape = tuple[str, Operand, Operand]  # operator, first and second operand


@dataclass(frozen=True, slots=True)
class Problem:
    """`prompt` ends with ` :` and `solution` with the answer; neither holds <bos> or <eos>. `steps` are the solution's, without ` ;`."""

    prompt: str
    solution: str
    answer: str
    steps: tuple[str, ...]
    structure: str

    @property
    def k(self) -> int:
        return len(self.steps)


@dataclass(frozen=True, slots=True)
class Structure:
    leaves: int
    steps: tuple[Shape, ...]
    distractor: Shape
    place: int  # the distractor stands before step `place`; len(steps): after the last

    def hash(self) -> str:
        return hashlib.blake2b(repr((self.leaves, self.steps, self.distractor, self.place)).encode(), digest_size=8).hexdigest()


def apply(op: str, x: int, y: int) -> int:
    """x op y modulo 23."""
    return (x + y if op == "+" else x - y if op == "-" else x * y) % MODULUS


def split_of(structure: str) -> str:
    """The split that a structure's hash belongs to."""
    tenth = int(structure, 16) % 10
    for name, share in SPLITS.items():
        if tenth < share:
            return name
        tenth -= share
    raise AssertionError("the shares of SPLITS do not sum to ten")


@cache
def is_hard(op: str, x: int, y: int) -> bool:
    """Whether x op y is one of the facts that the solutions which models learn from mostly get wrong."""
    return uniform(0, "hard", OPERATORS.index(op), x, y) < HARD


def slipped(problem: Problem, *noise: int | str) -> str:
    """The problem's solution as a fallible author writes it; slips are a pure function of `noise`, and later steps go on from them.

    A hard fact comes out wrong more often than right, and always in the same way: this knob leaves systematic errors in a policy, without
    which a majority vote would go to 100 %. Any other fact comes out wrong at random now and then: this makes samples differ.
    """
    stated, values = _facts(problem)
    parts = []
    for i, step in enumerate(problem.steps):
        name = step.split(" = ", 1)[0]
        first, op, second = stated[name].split()
        x, y = values[first], int(second) if second.isdigit() else values[second]
        values[name] = _worked(op, x, y, uniform(0, "slip", i, *noise))
        parts.append(f"{name} = {stated[name]} = {x} {op} {y} = {values[name]}")
    return " ; ".join([*parts, f"#### {values[name]}"])


def _worked(op: str, x: int, y: int, u: float) -> int:
    """x op y, or a wrong number, by a uniform number u: the hard facts' own wrong one, for the others one that u chooses."""
    hard = is_hard(op, x, y)
    most = HARD_SLIPS if hard else SLIPS
    off = 1 + int((MODULUS - 1) * (uniform(0, "wrong", OPERATORS.index(op), x, y) if hard else u / most))
    return (apply(op, x, y) + (off if u < most else 0)) % MODULUS


def sample_problem(seed: int, index: int, split: str, k: int | None = None) -> Problem:
    """Problem `index` of a split's stream `seed`; the same arguments always give the same problem.

    k: number of steps, by default uniform in 1..6. Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: choose from {', '.join(SPLITS)}")
    r = random.Random(key(seed, index, split))
    k = k or 1 + int(r.random() * MAX_STEPS)
    structure = _structure(r, k)
    while split_of(structure.hash()) != split:
        structure = _structure(r, k)
    return _fill(r, structure)


def problems(split: str, n: int | None = None, start: int = 0) -> Iterator[Problem]:
    """The fixed problems of a split: 2,000 for test, 1,000 for calibration, endless for train."""
    size = SIZES.get(split)
    stop = start + n if n is not None else size
    if size is not None and (stop is None or stop > size):
        raise ValueError(f"the {split} set has {size} problems")
    index = start
    while stop is None or index < stop:
        yield sample_problem(SEED, index, split)
        index += 1


def _pick(r: random.Random, items: list[Operand]) -> Operand:
    return items[int(r.random() * len(items))]


def _structure(r: random.Random, k: int) -> Structure:
    """k steps that the last one all needs: `open_` holds the results that nothing uses yet, and each step can close one of them net."""
    leaves = 2 if k == 1 else 3
    values: list[Operand] = [("leaf", i) for i in range(leaves)]
    open_: list[Operand] = []
    steps: list[Shape] = []
    for i in range(k):
        after = k - 1 - i  # steps that follow; `open_` may hold at most after + 1 results once this step is done
        uses = [n for n in (0, 1, 2) if n <= len(open_) and len(open_) - n <= after]
        n = uses[int(r.random() * len(uses))]
        first = _pick(r, open_ if n else values)
        rest = [o for o in open_ if o != first]
        second = _pick(r, rest) if n == 2 else ("literal", 0) if r.random() < 0.3 else _pick(r, [v for v in values if v != first])
        if n < 2 and r.random() < 0.5 and second[0] != "literal":
            first, second = second, first
        steps.append((OPERATORS[int(r.random() * 3)], first, second))
        open_ = [o for o in open_ if o != first and o != second] + [("step", i)]
        values.append(("step", i))
    place = int(r.random() * (k + 1))
    seen = values[: leaves + place]
    first = _pick(r, seen)
    second = ("literal", 0) if r.random() < 0.3 else _pick(r, [v for v in seen if v != first])
    return Structure(leaves, tuple(steps), (OPERATORS[int(r.random() * 3)], first, second), place)


def _numbers(r: random.Random, structure: Structure) -> tuple[list[int], list[int], list[tuple[int, int, int]]]:
    """Values of the leaves, of the literals (one a step, used or not), and (x, y, result) of each step."""
    leaves = [int(r.random() * MODULUS) for _ in range(structure.leaves)]
    literals = [int(r.random() * MODULUS) for _ in structure.steps]
    worked: list[tuple[int, int, int]] = []
    for (op, first, second), literal in zip(structure.steps, literals, strict=True):
        x, y = (leaves[i] if kind == "leaf" else worked[i][2] if kind == "step" else literal for kind, i in (first, second))
        worked.append((x, y, apply(op, x, y)))
    return leaves, literals, worked


def _fill(r: random.Random, structure: Structure) -> Problem:
    names = list(NAMES)
    for i in range(len(names) - 1, 0, -1):
        j = int(r.random() * (i + 1))
        names[i], names[j] = names[j], names[i]
    leaf, step, spare = names[: structure.leaves], names[structure.leaves : -1], names[-1]
    leaves, literals, worked = _numbers(r, structure)
    name = {"leaf": leaf, "step": step}

    def expression(shape: Shape, literal: int) -> str:
        op, (kind, i), (kind2, i2) = shape
        return f"{name[kind][i]} {op} {literal if kind2 == 'literal' else name[kind2][i2]}"

    stated = [f"{n} = {v}" for n, v in zip(leaf, leaves, strict=True)]
    distractor = f"{spare} = {expression(structure.distractor, int(r.random() * MODULUS))}"
    steps = []
    for i, shape in enumerate(structure.steps):
        if structure.place == i:
            stated.append(distractor)
        x, y, result = worked[i]
        stated.append(f"{step[i]} = {expression(shape, literals[i])}")
        steps.append(f"{stated[-1]} = {x} {shape[0]} {y} = {result}")
    if structure.place == len(structure.steps):
        stated.append(distractor)
    answer = str(worked[-1][2])
    prompt = " ; ".join([*stated, f"? {step[len(steps) - 1]} :"])
    return Problem(prompt, " ; ".join([*steps, f"#### {answer}"]), answer, tuple(steps), structure.hash())


_STEP = re.compile(r"([a-l]) = (([a-l]) ([-+*]) ([a-l]|\d+)) = (\d+) \4 (\d+) = (\d+)")


def _facts(problem: Problem) -> tuple[dict[str, str], dict[str, int]]:
    """What the prompt states: name -> expression text, and name -> value of the leaves."""
    stated, values = {}, {}
    for statement in problem.prompt.split(" ; ")[:-1]:
        name, _, expression = statement.partition(" = ")
        stated[name] = expression
        if expression.isdigit():
            values[name] = int(expression)
    return stated, values


def check_steps(problem: Problem, text: str) -> list[bool]:
    """The true step checker: entry i says whether steps 0..i of `text` are all right; a final `#### n` counts as one step.

    A step is right if it copies a statement of the prompt whose operands are known, with their true values and result. Steps in another
    order than the reference's, and a distractor worked out rightly, are right: they can still lead to the answer. Text after the answer
    makes nothing wrong. An unfinished last step is wrong, as no right step lacks its delimiter.
    """
    stated, values = _facts(problem)
    query = problem.prompt.split()[-2]
    parts = text.split("<eos>")[0].strip().split(" ;")
    flags: list[bool] = []
    right = True
    for i, part in enumerate(p.strip() for p in parts):
        last = i == len(parts) - 1
        if last and not part:
            break
        if part.startswith("####"):
            flags.append(right and query in values and answer_of(part) == str(values[query]))
            break
        right = right and not last and _right(part, stated, values)
        flags.append(right)
    return flags


def _right(step: str, stated: dict[str, str], values: dict[str, int]) -> bool:
    """Whether one step is right; if so its result joins `values`."""
    m = _STEP.fullmatch(step)
    if m is None:
        return False
    name, expression, first, op, second, x, y, result = m.groups()
    known_y = int(second) if second.isdigit() else values.get(second)
    ok = stated.get(name) == expression and values.get(first) == int(x) and known_y == int(y) and apply(op, int(x), int(y)) == int(result)
    if ok:
        values[name] = int(result)
    return ok


def answer_of(text: str) -> str | None:
    """The number after `####`, or None if there is none."""
    m = re.search(r"####\s*(\d+)", text)
    return m.group(1) if m else None
