"""Small changes of functions that the tests have to notice."""

from __future__ import annotations

from pathlib import Path

from scripts.mutations import compile_mutation, list_mutations

SOURCE = """
def scale(x, factor=2):
    total = sum((x, len("ab") + 1))
    if total > factor:
        raise ValueError(f"{total + 1}")
    return max(total, 3)
"""


def test_list_mutations_names_changes_inside_arguments(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(SOURCE)
    found = list_mutations(tmp_path, "file.py")
    assert [m.name.removeprefix("file.py:scale: ") for m in found] == [
        "len('ab') + 1 -> len('ab') - 1 in an argument",
        "1 -> 2 in an argument",
        "total > factor -> total >= factor",
        "raise ValueError(f'{total + 1}') -> pass",
        "3 -> 4 in an argument",
    ]


def test_compile_mutation_changes_one_function(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(SOURCE)
    [mutation] = [m for m in list_mutations(tmp_path, "file.py") if "- 1" in m.name]
    changed = compile_mutation(tmp_path, mutation)
    assert [code.co_name for code in changed] == ["<module>", "scale"]
    old, new = list(changed.items())[-1]

    def scale(x: int, factor: int = 9) -> int:
        return 0

    for code, result in ((old, 4), (new, 3)):
        scale.__code__ = code
        assert scale(1) == result
