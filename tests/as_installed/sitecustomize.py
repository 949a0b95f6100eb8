"""Hides from the product's own commands what only the tests install: a Python that starts with this folder on its
PYTHONPATH, or imports this module first, finds what requirements.txt brings and nothing more. So what works by
accident, because torch brought a package along, fails in the tests as it would for a user."""

import sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"


def installed_with(lines: list[str]) -> set[str]:
    """The packages that these requirements bring, those of their extras too."""
    found: set[str] = set()
    waiting = [(Requirement(line), frozenset({""})) for line in lines]
    while waiting:
        requirement, extras = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if name in found and not requirement.extras:
            continue
        found.add(name)
        try:
            below = requires(name) or []
        except PackageNotFoundError:
            continue
        waiting += [(Requirement(line), frozenset({"", *requirement.extras})) for line in below]
    return found


def foreign_modules() -> frozenset[str]:
    """Top-level modules of all other packages here."""
    lines = [line for line in _REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]
    ours = installed_with(lines)
    return frozenset(
        module
        for module, packages in packages_distributions().items()
        if not ours & {canonicalize_name(name) for name in packages}
    )


class OnlyInstalled(PathFinder):
    """Finds no foreign module."""

    foreign = foreign_modules()

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return (
            None if fullname.partition(".")[0] in cls.foreign else super().find_spec(fullname, path, target)
        )


sys.meta_path[:] = [OnlyInstalled if finder is PathFinder else finder for finder in sys.meta_path]
