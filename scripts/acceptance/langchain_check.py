"""Checks langchain-openai, which sends null for unset fields.  python langchain_check.py BASE MODEL"""

import sys
from typing import Literal

from checks import Checks
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

base, model = sys.argv[1:]
check = Checks()
AT = {"base_url": f"{base}/v1", "api_key": "EMPTY", "model": model, "temperature": 0, "max_retries": 0}
PROMPT = "Hi, two tickets please."


class Ticket(BaseModel):
    """A ticket that somebody wants."""

    kind: Literal["bus", "train", "plane"]
    count: Literal[1, 2, 3]


chat = ChatOpenAI(**AT, max_tokens=16, stream_usage=True)

with check("a streamed chat is the whole one, with usage"):
    whole, parts = chat.invoke(PROMPT), list(chat.stream(PROMPT))
    assert "".join(part.content for part in parts) == whole.content != ""
    assert whole.usage_metadata["total_tokens"] > whole.usage_metadata["input_tokens"] > 0
    assert (
        sum((p.usage_metadata or {}).get("total_tokens", 0) for p in parts)
        == (whole.usage_metadata["total_tokens"])
    )

with check("a batch is what each gets alone"):
    assert {m.content for m in chat.batch([PROMPT] * 6)} == {chat.invoke(PROMPT).content}

with check("text completion"):
    assert OpenAI(**AT, max_tokens=8).invoke("Once upon a time")

for method in ("json_schema", "function_calling"):
    with check(f"structured output by {method}"):
        made = ChatOpenAI(**AT, max_tokens=200).with_structured_output(Ticket, method=method).invoke(PROMPT)
        assert isinstance(made, Ticket)

sys.exit(check.finish())
