"""What the doctor found, to print or to read by a program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        check: short name of the check that found it, such as ``"init-tracker"``.
        problem: what is wrong, and what comes of it.
        remedy: the line that cures it.
    """

    check: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.check}: {self.problem}\n    remedy: {self.remedy}"


@dataclass
class Report:
    """All that is wrong with a wiring: empty, and so falsy, if nothing is.

    Attributes:
        findings: in the order of the wiring: policy, environment, batch, loss, runs.
        measured: numbers by name; ``"single_step_difference"`` is the largest relative difference
            between single steps and sequences, ``"staleness"`` that of stored states.
        looked_at: what was given: ``"policy"``, ``"env"``, ``"batch"``, ``"loss"``.

    Examples:
        >>> report = Report(looked_at=["policy"])
        >>> len(report), bool(report)
        (0, False)
        >>> print(report)
        Nothing is wrong with the policy.
    """

    findings: list[Finding] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    looked_at: list[str] = field(default_factory=list)

    def add(self, check: str, problem: str, remedy: str) -> None:
        """Add a finding, unless the same one is there (policy and loss may share a module)."""
        finding = Finding(check, problem, remedy)
        if finding not in self.findings:
            self.findings.append(finding)

    def checks(self) -> list[str]:
        """Return the names of the checks that found something.

        Examples:
            >>> report = Report()
            >>> report.add("mode", "a module is frozen", "unfreeze it")
            >>> report.checks()
            ['mode']
        """
        return [finding.check for finding in self.findings]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, which ``json`` writes.

        Examples:
            >>> Report(measured={"staleness": 0.5}).as_dict()
            {'findings': [], 'measured': {'staleness': 0.5}, 'looked_at': []}
        """
        return asdict(self)

    def __len__(self) -> int:
        return len(self.findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __str__(self) -> str:
        things = ", ".join(f"the {name}" for name in self.looked_at)
        if self.findings:
            lines = [f"{len(self)} wrong with {things}:"]
        else:
            lines = [f"Nothing is wrong with {things}."]
        lines += [f"{number}. {one}" for number, one in enumerate(self.findings, 1)]
        lines += [f"{name.replace('_', ' ')}: {value:.3g}" for name, value in self.measured.items()]
        return "\n".join(lines)
