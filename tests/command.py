"""The ``mixdq`` command inside a test's process."""

from __future__ import annotations

from mixdq_ao.app import cli


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """The command in this process: exit code, standard output, standard error."""
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as e:
        code = int(e.code or 0)
    out, err = capsys.readouterr()
    return code, out, err
