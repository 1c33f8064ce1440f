"""A URL where only a path will do is refused, instead of becoming a folder called `s3:`."""

from pathlib import Path

import pytest

from vaegan_dist.cli import main


@pytest.mark.parametrize(
    "command",
    [
        ["prepare", "digits", "s3://bucket/x"],
        ["encode", "run", "s3://bucket/x"],
        ["export", "run", "s3://bucket/x"],
        ["sample", "run", "--output", "s3://bucket/x"],
        ["evaluate", "run", "--output", "s3://bucket/x"],
        ["report", "run", "--output", "s3://bucket/x"],
        ["status", "s3://bucket/x"],
    ],
    ids=lambda command: command[0],
)
def test_a_url_is_not_taken_for_a_path(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "s3://bucket/x is a URL" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
