"""The documents say what the results say."""

import pytest
import speed_tables
from quote import DOCUMENTS, TABLES, quoted


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_quote_the_committed_results(path):
    text = path.read_text(encoding="utf-8")
    assert quoted(text) == text


def test_every_table_is_quoted():
    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    assert all(f"<!-- {name} -->" in text for name in TABLES)


def test_a_heading_says_how_many_rounds_each_part_of_its_table_had():
    machine = {"versions": {"torch": "2"}, "threads": 1, "processor": "P", "dtype": "float32"}

    def heading(*counts):
        parts = {f"fit/{n}": {"about": machine | {"rounds": n}} for n in counts}
        return speed_tables._conditions(parts, "fit")

    assert heading(9, 5, 7) == "P, 1 thread, float32, 5 to 9 rounds, torch 2"
    assert heading(5) == "P, 1 thread, float32, 5 rounds, torch 2"
    assert heading(1) == "P, 1 thread, float32, 1 round, torch 2"
