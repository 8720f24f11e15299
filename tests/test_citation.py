"""The citation names this version, and every paper that the package's method is from."""

from pathlib import Path

from ebr_engine.version import __version__

FILE = Path(__file__).parents[1] / "CITATION.cff"


def test_the_citation_is_of_this_version_and_names_the_method():
    text = FILE.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert f"version: {__version__}" in lines
    assert "license: Apache-2.0" in lines
    for paper in ("2604.04924", "2604.10983"):
        assert f'value: "arXiv:{paper}"' in text
    assert all(f"{key}:" in text for key in ("cff-version", "message", "title", "authors"))
