"""Checks structured answers by schema and by tool with instructor.  python instructor_check.py BASE MODEL"""

import sys
from typing import Literal

import instructor
import openai
from checks import Checks
from pydantic import BaseModel

base, model = sys.argv[1:]
check = Checks()
plain = openai.OpenAI(base_url=f"{base}/v1", api_key="EMPTY", max_retries=0)
MESSAGES = [{"role": "user", "content": "Hi, two tickets please."}]


class Ticket(BaseModel):
    """A ticket that somebody wants."""

    kind: Literal["bus", "train", "plane"]
    count: Literal[1, 2, 3]


for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
    with check(f"{mode.name}"):
        client = instructor.from_openai(plain, mode=mode)
        made = client.create(
            model=model, messages=MESSAGES, response_model=Ticket, max_tokens=200, max_retries=0
        )
        assert isinstance(made, Ticket)

sys.exit(check.finish())
