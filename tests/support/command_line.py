"""The command line in this process."""

from jmoe.cli.main import main


def run(capsys, *argv: str) -> tuple[int, str, str]:
    """Returns exit code, standard output and standard error."""
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err
