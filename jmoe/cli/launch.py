"""``jmoe launch``: an agent that works with a server of this machine, or with the one at a URL."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jmoe.cli.flags import add_command

if TYPE_CHECKING:
    from jmoe.tools.launch import Target

DEFAULT_URL = "http://127.0.0.1:8000"  # of ``jmoe serve`` without flags


def add_launch(commands: Any) -> None:
    from jmoe.tools.launch import AGENTS

    text = "an agent with the variables that lead it to a server; what follows -- is the agent's own"
    p = add_command(commands, "launch", run_launch, text)
    p.add_argument("agent", choices=sorted(AGENTS))
    p.add_argument("--model", metavar="M", help="started here, unless the server serves it already")
    p.add_argument("--url", metavar="U", help=f"of the server (default: {DEFAULT_URL}, if one is there)")
    p.add_argument("--api-key", metavar="K", help="of the server")
    p.add_argument("--print", dest="prints", action="store_true", help="print the variables and the command")


def split_forwarded(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the words of ``jmoe launch``, and those after ``--``, which are the agent's; another command
    keeps all its words."""
    words = list(argv)
    if words[:1] != ["launch"] or "--" not in words:
        return words, []
    cut = words.index("--")
    return words[:cut], words[cut + 1 :]


def run_launch(args: argparse.Namespace) -> int:
    from jmoe.tools.launch import AGENTS, check_installed, launch_of

    agent, values = AGENTS[args.agent], vars(args)
    if "prints" not in values:
        check_installed(agent)
    with _target(values) as target:
        launch = launch_of(agent, target, values.get("forwarded", ()))
        if "prints" in values:
            print(launch.shell())
            return 0
        for line in launch.told(target.api_key):
            print(f"jmoe: {line}", file=sys.stderr)
        return launch.run()


@contextlib.contextmanager
def _target(values: dict[str, Any]) -> Iterator["Target"]:
    """Yields the server at the URL, or the one that is there already and serves the model, or a new one that
    ends with the agent."""
    from jmoe.tools.chat_client import ChatClient
    from jmoe.tools.launch import Target
    from jmoe.tools.local_server import started

    url, model, key = values.get("url"), values.get("model"), values.get("api_key")
    client = ChatClient(url or DEFAULT_URL, key)
    try:
        served = client.models()
    except ValueError:  # nobody or another program is there, or the key is wrong
        if url is not None:
            raise
        served = []
    fitting = [each for each in served if model in (None, each.name)]
    if fitting:
        yield Target(client.url, fitting[0].name, fitting[0].context, key)
        return
    names = ", ".join(each.name for each in served)
    if url is not None:
        raise ValueError(f"{client.url} serves {names or 'no model'}, not {model!r}")
    if model is None:
        raise ValueError(f"no server answers at {client.url}: give --model, which is started, or --url")
    if "prints" in values:
        raise ValueError(f"no server at {client.url} serves {model!r}: start one, or give --url")
    with started([model], sys.stderr) as own:
        (mine,) = ChatClient(own).models()
        yield Target(own, mine.name, mine.context)
