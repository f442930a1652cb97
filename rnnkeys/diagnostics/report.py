"""The result of ``check_recurrent_policy``, to print or to be read by a program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..checks import Problem


@dataclass
class Report:
    """All problems of a wiring; empty, and so falsy, if there are none.

    Attributes:
        problems: in the order of the wiring: policy, environment, batch, loss, runs.
        measured: numbers by name. ``"single_step_difference"`` is the largest relative difference
            between single steps and sequences; ``"staleness"`` is that of the stored states.
        looked_at: the arguments that were given: ``"policy"``, ``"env"``, ``"batch"``, ``"loss"``.

    Examples:
        >>> report = Report(looked_at=["policy"])
        >>> len(report), bool(report)
        (0, False)
        >>> print(report)
        Nothing is wrong with the policy.
    """

    problems: list[Problem] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    looked_at: list[str] = field(default_factory=list)

    def add(self, problems: Iterable[Problem]) -> bool:
        """Add problems, each once, since policy and loss may share a module.

        Args:
            problems: of one check.

        Returns:
            Whether there was none.
        """
        found = list(dict.fromkeys(problems))
        self.problems += [one for one in found if one not in self.problems]
        return not found

    def checks(self) -> list[str]:
        """Return the names of the checks that found a problem.

        Examples:
            >>> report = Report()
            >>> report.add([Problem("mode", "A module is frozen.", "Unfreeze it.")])
            False
            >>> report.checks()
            ['mode']
        """
        return [one.check for one in self.problems]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, which ``json`` writes.

        Examples:
            >>> Report(measured={"staleness": 0.5}).as_dict()
            {'problems': [], 'measured': {'staleness': 0.5}, 'looked_at': []}
        """
        problems = [
            {"check": one.check, "message": one.message, "remedy": one.remedy}
            for one in self.problems
        ]
        measured, looked_at = dict(self.measured), list(self.looked_at)
        return {"problems": problems, "measured": measured, "looked_at": looked_at}

    def __len__(self) -> int:
        return len(self.problems)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self.problems)

    def __str__(self) -> str:
        things = ", ".join(f"the {name}" for name in self.looked_at)
        found = "1 problem" if len(self) == 1 else f"{len(self)} problems"
        lines = [f"{found} with {things}:" if self.problems else f"Nothing is wrong with {things}."]
        for place, one in enumerate(self.problems, 1):
            lines += [f"{place}. {one.check}: {one.message}", f"    remedy: {one.remedy}"]
        lines += [f"{name.replace('_', ' ')}: {value:.3g}" for name, value in self.measured.items()]
        return "\n".join(lines)
