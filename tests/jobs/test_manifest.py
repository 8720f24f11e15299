"""Manifests: rows with their lines; what is wrong is one line that names the place."""

import pytest

from ebr_engine.jobs.manifest import read_manifest
from ebr_engine.media.decoding import MediaError


def rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(row.where.rpartition(":")[2], row.input, row.output, row.task) for row in read_manifest(tmp_path / name)]


def test_csv_columns_in_any_order_quotes_and_empty_lines(tmp_path):
    content = 'task,input\r\nhaze,a.png\r\n\r\n,"b, c.png"\r\n rain , d.png \r\n,"with\nline.png"\r\n'
    assert rows(tmp_path, "list.csv", content) == [
        ("2", "a.png", None, "haze"),
        ("4", "b, c.png", None, None),
        ("5", "d.png", None, "rain"),
        ("7", "with\nline.png", None, None),
    ]


def test_csv_of_spreadsheets_begins_with_a_mark(tmp_path):
    assert rows(tmp_path, "list.CSV", "input,output\nä.png,ö.png\n".encode("utf-8-sig")) == [("2", "ä.png", "ö.png", None)]


def test_json_lines(tmp_path):
    content = '{"input": "a.png"}\n\n{"input": "b.png", "output": "c.png", "task": null}\n'
    assert rows(tmp_path, "list.jsonl", content) == [("1", "a.png", None, None), ("3", "b.png", "c.png", None)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("list.txt", "input\na.png\n", [".csv or .jsonl"]),
        ("list.csv", "", ["no rows"]),
        ("list.csv", "input,output\n\n", ["no rows"]),
        ("list.csv", "output\na.png\n", [":1", "no column named input"]),
        ("list.csv", "input,input\na.png,b.png\n", [":1", "twice"]),
        ("list.csv", "input;output\na.png;b.png\n", [":1", "'input;output'"]),
        ("list.csv", "input\na.png,b.png\n", [":2", "2 cells", "1"]),
        ("list.csv", "output,input\na.png\n", [":2", "input is empty"]),
        ("list.csv", 'input\n"a.png\n', ["not CSV"]),
        ("list.csv", b"input\na\xff.png\n", [":2", "UTF-8"]),
        ("list.csv", b"input\na\0b.png\n", [":2"]),
        ("list.jsonl", '{"input": "a.png"}\n{"input": \n', [":2", "not JSON"]),
        ("list.jsonl", "[" * 100_000, [":1", "not JSON"]),
        ("list.jsonl", '["a.png"]\n', [":1", "object"]),
        ("list.jsonl", '{"input": 3}\n', [":1", "text", "3"]),
        ("list.jsonl", '{"input": "a.png", "sede": 3}\n', [":1", "'sede'"]),
        ("list.jsonl", '{"output": "a.png"}\n', [":1", "input"]),
        ("list.jsonl", '{"input": "\\ud800.png"}\n', [":1", "characters"]),
    ],
)
def test_what_is_wrong_is_one_line_with_the_place(tmp_path, name, content, words):
    with pytest.raises(MediaError) as caught:
        rows(tmp_path, name, content)
    assert "\n" not in str(caught.value)
    for word in (name, *words):
        assert word in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path / "nope.csv", tmp_path):
        with pytest.raises(MediaError):
            read_manifest(path)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(MediaError, match="not a regular file"):
        read_manifest(tmp_path / "folder.csv")
