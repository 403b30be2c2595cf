"""``jmoe chat``: a conversation with a server, or with one that is started for it."""

import argparse
import os
import sys
from collections.abc import Iterable
from typing import Any

from jmoe.cli.flags import Parser, add_command, add_model_flags, integer, number


def add_chat(commands: Any) -> None:
    text = "a conversation in the terminal, with MODEL or with the server at a URL"
    p = add_command(commands, "chat", run_chat, text)
    add_model_flags(p)
    p.add_argument("--model", dest="served_model", metavar="NAME", help="of the server at the URL")
    p.add_argument("--api-key", metavar="K", help="of the server at the URL")
    p.add_argument("--system", metavar="TEXT", help="what the model is told first")
    p.add_argument("--max-tokens", type=integer, metavar="N", help="of an answer")
    p.add_argument("--temperature", type=number, metavar="X")
    p.add_argument("--exact", action="store_true", help="begin with /exact on")


def run_chat(args: argparse.Namespace) -> int:
    from jmoe.tools.local_server import started

    values = vars(args) | {}
    model = values.get("model", "tiny")
    if "://" in model:
        given = model_words({k: v for k, v in values.items() if k != "model"})
        if given:
            raise ValueError(f"{given[0]} is for a model that is started here, and {model} runs already")
        return _talk(model, values)
    if unused := [flag for flag in ("served_model", "api_key") if flag in values]:
        name = {"served_model": "--model"}.get(unused[0], "--api-key")
        raise ValueError(f"{name} is for the server at a URL, and {model!r} is not one")
    with started([model, *model_words(values), "--max-num-seqs", "1"], sys.stderr) as url:
        return _talk(url, values)


def _talk(url: str, values: dict[str, Any]) -> int:
    from jmoe.tools.chat import Conversation, Screen, chat
    from jmoe.tools.chat_client import ChatClient

    client = ChatClient(url, values.get("api_key"))
    name = values.get("served_model") or _first(client)
    fields = {key: values[key] for key in ("max_tokens", "temperature") if key in values}
    talk = Conversation({"model": name} | fields, values.get("system", ""), "exact" in values)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    screen = Screen(sys.stdout, is_terminal=is_terminal, has_colours="NO_COLOR" not in os.environ)
    if is_terminal:
        import readline  # noqa: F401  arrow keys and earlier lines in ``input``
    return chat(client, talk, lambda: input("> " if is_terminal else ""), screen)


def _first(client: Any) -> str:
    models = client.models()
    if not models:
        raise ValueError(f"{client.url} serves no model")
    return models[0].name


def model_words(values: dict[str, Any]) -> list[str]:
    """Returns the given flags of a model, for another ``jmoe`` command."""
    parser = Parser(argument_default=argparse.SUPPRESS)
    add_model_flags(parser)
    return list(_words(parser._actions, values))


def _words(actions: Iterable[argparse.Action], values: dict[str, Any]) -> Iterable[str]:
    for action in actions:
        if action.option_strings and action.dest in values:
            yield from (action.option_strings[-1], str(values[action.dest]))
