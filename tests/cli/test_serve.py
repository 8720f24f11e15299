"""The command that starts the server: what it refuses, in a line, before a model is loaded."""

import pytest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "--token-file"),
        (["--max-upload", "much"], "--max-upload much: a size is written like 500M or 20G"),
        (["--store-size", "0G"], "--store-size 0G"),
        (["--port", "0"], "--port"),
    ],
)
def test_a_start_that_cannot_be_is_refused(cli, tmp_path, arguments, words):
    code, _, stderr = cli("serve", "--store", str(tmp_path / "store"), *arguments)
    assert code == 2
    assert words in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert not (tmp_path / "store").exists()


def test_a_token_file_that_others_may_read_is_refused(cli, tmp_path):
    token = tmp_path / "token"
    token.write_text("a-token-of-the-tests-0123")
    token.chmod(0o644)
    code, _, stderr = cli("serve", "--host", "0.0.0.0", "--token-file", str(token))
    assert code == 2
    assert "chmod 600" in stderr


def test_a_port_that_is_taken_is_told(cli, tmp_path, engine):
    import socket

    pytest.importorskip("uvicorn", reason="needs the extra serve")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, _, stderr = cli("serve", "--port", port, "--store", str(tmp_path / "store"))
    assert code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in stderr
