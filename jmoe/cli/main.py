"""The command line: parses, calls ``jmoe.tools`` or the server, prints. Each command does its heavy imports.

Exit code 0 on success, 2 with one line on standard error for a usage or input error.
"""

import sys
from collections.abc import Sequence

from jmoe import __version__
from jmoe.cli.bench import add_bench
from jmoe.cli.chat import add_chat
from jmoe.cli.commands import add_convert, add_doctor, add_eval, add_generate, add_place, add_profile
from jmoe.cli.flags import Parser, reported
from jmoe.cli.launch import add_launch, split_forwarded
from jmoe.cli.serve import add_serve

COMMANDS = (
    add_serve, add_chat, add_launch, add_generate, add_eval, add_profile, add_place, add_bench, add_doctor,
    add_convert,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    words, forwarded = split_forwarded(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    if forwarded:
        args.forwarded = forwarded
    return reported(lambda: args.run(args))


def parser() -> Parser:
    top = Parser(prog="jmoe", description="Serves Mixture-of-Experts language models.")
    top.add_argument("--version", action="version", version=f"jmoe {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for add in COMMANDS:
        add(commands)
    return top


if __name__ == "__main__":
    sys.exit(main())
