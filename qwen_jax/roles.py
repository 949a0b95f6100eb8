"""What a prompt's token is part of, as the small number that a shard stores, and its name.

The names are the grammar of `--keep_tokens role:...` too.
"""

from collections.abc import Iterable

import numpy as np

from qwen_jax.errors import UsageError

ROLE_NAMES = (
    *("template", "system", "instruction", "text", "user", "assistant", "test_input", "answer"),
    *("think", "tool", "rollout"),
)
"""Roles that do not count examples; a role's code is its place here."""
TEMPLATE, SYSTEM, INSTRUCTION, TEXT, USER, ASSISTANT, TEST_INPUT, ANSWER, THINK, TOOL, ROLLOUT = range(
    len(ROLE_NAMES)
)
EXAMPLE_SIDES = ("input", "output")
_FIRST_EXAMPLE = 16


def example_role(example: int, side: str) -> int:
    """The code of a training example's grid. example: from 1, as in the task; side: input or output."""
    return _FIRST_EXAMPLE + 2 * (example - 1) + EXAMPLE_SIDES.index(side)


def role_name(code: int) -> str:
    """`test_input`, `example_1_output`, ...; raises ValueError for a number that is no role's."""
    if 0 <= code < len(ROLE_NAMES):
        return ROLE_NAMES[code]
    if code < _FIRST_EXAMPLE:
        raise ValueError(f"no role has the code {code}")
    example, side = divmod(int(code) - _FIRST_EXAMPLE, 2)
    return f"example_{example + 1}_{EXAMPLE_SIDES[side]}"


class RoleSet:
    """Roles given by name. `example_input` and `example_output` stand for those of every example."""

    def __init__(self, names: Iterable[str]):
        """Raises UsageError for a name that is no role's, or when there is none."""
        self.names = tuple(names)
        self._codes: list[int] = []
        self._sides: list[int] = []
        for name in self.names:
            self._add(name)
        if not self.names:
            raise UsageError("name at least one role")

    def _add(self, name: str) -> None:
        if name in ROLE_NAMES:
            self._codes.append(ROLE_NAMES.index(name))
            return
        kind, *number, side = name.split("_") if name.count("_") in (1, 2) else ("", "")
        if kind != "example" or side not in EXAMPLE_SIDES or not all(_is_number(text) for text in number):
            raise UsageError(
                f"no role is called {name!r}; roles are {', '.join(ROLE_NAMES)}, example_input, "
                "example_output, example_1_input, example_1_output and so on"
            )
        if number:
            self._codes.append(example_role(int(number[0]), side))
        else:
            self._sides.append(EXAMPLE_SIDES.index(side))

    def mask(self, roles: np.ndarray) -> np.ndarray:
        """bool, of the shape of `roles` (codes): whether each is one of these."""
        wanted = np.isin(roles, self._codes)
        for side in self._sides:
            wanted |= (roles >= _FIRST_EXAMPLE) & ((roles - _FIRST_EXAMPLE) % 2 == side)
        return wanted


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and not text.startswith("0") and len(text) < 6
