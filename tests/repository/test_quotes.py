"""The documents say what the results say."""

import pytest
from quote import DOCUMENTS, TABLES, quoted


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_quote_the_committed_results(path):
    text = path.read_text(encoding="utf-8")
    assert quoted(text) == text


def test_every_table_is_quoted():
    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    assert all(f"<!-- {name} -->" in text for name in TABLES)
