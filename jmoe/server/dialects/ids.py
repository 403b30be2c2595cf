"""Ids of calls, in the forms that families of models know."""

import secrets
import string

from jmoe.server.dialects.format import Ids

ALPHABET = string.ascii_letters + string.digits


def letters() -> str:
    """Returns nine letters and digits: some models' templates demand exactly this of the ids in a
    conversation."""
    return "".join(secrets.choice(ALPHABET) for _ in range(9))


def new_id(form: Ids, name: str, number: int) -> str:
    """Returns an id for a call.

    name: name of the function.
    number: number of calls in the conversation before it.
    """
    return f"functions.{name}:{number}" if form == "functions" else letters()
