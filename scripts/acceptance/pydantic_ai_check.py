"""Checks pydantic-ai, the strictest reader of answers.  python pydantic_ai_check.py BASE MODEL"""

import asyncio
import sys
from typing import Literal

from checks import Checks
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

base, name = sys.argv[1:]
check = Checks()
model = OpenAIChatModel(name, provider=OpenAIProvider(base_url=f"{base}/v1", api_key="EMPTY"))
SHORT = {"temperature": 0, "max_tokens": 16}
LONG = {"temperature": 0, "max_tokens": 200}
PROMPT = "Hi, two tickets please."


class Ticket(BaseModel):
    """A ticket that somebody wants."""

    kind: Literal["bus", "train", "plane"]
    count: Literal[1, 2, 3]


async def streamed() -> str:
    async with Agent(model).run_stream(PROMPT, model_settings=SHORT) as result:
        return await result.get_output()


with check("a streamed answer is the whole one"):
    whole = Agent(model).run_sync(PROMPT, model_settings=SHORT)
    assert asyncio.run(streamed()) == whole.output != ""

for kind in (NativeOutput, ToolOutput):
    with check(f"{kind.__name__}"):
        agent = Agent(model, output_type=kind(Ticket), retries=0)
        assert isinstance(agent.run_sync(PROMPT, model_settings=LONG).output, Ticket)

sys.exit(check.finish())
