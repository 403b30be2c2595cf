"""Agents' packages of Python over the scripted server: openai (Responses), openai-agents, anthropic.

python agents_python.py BASE MODEL
"""

import asyncio
import os
import sys
from typing import Any

import agents
import anthropic
import openai
from checks import Checks
from pydantic import BaseModel

base, model = sys.argv[1:]
os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"
check = Checks()
TEXT, ARGUMENTS = "It is sunny: 21 degrees.", {"city": "Paris"}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
FLAT: Any = [{"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True}]


class Weather(BaseModel):
    city: str
    degrees: int


client = openai.OpenAI(base_url=f"{base}/v1", api_key="EMPTY", max_retries=0, timeout=30)
with check("responses: whole"):
    assert client.responses.create(model=model, input="hi").output_text == TEXT
with check("responses: stream"):
    with client.responses.stream(model=model, input="hi") as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_response().output_text == TEXT
    assert {"response.created", "response.output_text.delta", "response.completed"} <= kinds
with check("responses: a call and its result, by previous_response_id"):
    first = client.responses.create(model=model, input="Weather in Paris?", tools=FLAT)
    call = first.output[-1]
    assert call.type == "function_call" and call.arguments == '{"city": "Paris"}'
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    second = client.responses.create(model=model, input=result, previous_response_id=first.id, tools=FLAT)
    assert second.output_text == TEXT
    assert client.responses.retrieve(second.id).output_text == TEXT
    client.responses.delete(second.id)
with check("responses: a streamed call"):
    with client.responses.stream(model=model, input="Weather?", tools=FLAT) as stream:
        list(stream)
        call = stream.get_final_response().output[-1]
    assert call.type == "function_call" and call.parsed_arguments == ARGUMENTS
with check("responses: a parsed answer"):
    parsed = client.responses.parse(model=model, input="hi", text_format=Weather).output_parsed
    assert parsed == Weather(city="Paris", degrees=21)
with check("responses: input tokens"):
    assert client.responses.input_tokens.count(model=model, input="hi").input_tokens > 0
with check("chat: a streamed call"):
    tools: Any = [
        {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA, "strict": True}}
    ]
    ask: Any = [{"role": "user", "content": "Weather?"}]
    with client.chat.completions.stream(model=model, messages=ask, tools=tools) as stream:
        list(stream)
        [call] = stream.get_final_completion().choices[0].message.tool_calls or []
    assert call.function.arguments == '{"city": "Paris"}'


@agents.function_tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


async def streamed(agent: agents.Agent) -> str:
    result = agents.Runner.run_streamed(agent, "Weather in Paris?", max_turns=4)
    async for _ in result.stream_events():
        pass
    return result.final_output


for kind in (agents.OpenAIResponsesModel, agents.OpenAIChatCompletionsModel):
    for is_streamed in (False, True):
        with check(f"openai-agents: {kind.__name__}, {'streamed' if is_streamed else 'whole'}"):
            own = openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="EMPTY", max_retries=0, timeout=30)
            made = kind(model=model, openai_client=own)
            agent = agents.Agent(name="a", instructions="Help.", tools=[get_weather], model=made)
            if is_streamed:
                assert asyncio.run(streamed(agent)) == TEXT
            else:
                assert agents.Runner.run_sync(agent, "Weather in Paris?", max_turns=4).final_output == TEXT

claude = anthropic.Anthropic(base_url=base, api_key="EMPTY", max_retries=0, timeout=30)
own_tools: Any = [{"name": "get_weather", "input_schema": SCHEMA}]
hi: Any = {"model": model, "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}
with check("anthropic: whole"):
    message = claude.messages.create(**hi)
    assert message.content[-1].text == TEXT and message.stop_reason == "end_turn"
with check("anthropic: stream"), claude.messages.stream(**hi) as stream:
    assert "".join(stream.text_stream) == TEXT
    assert stream.get_final_message().usage.output_tokens > 0
with check("anthropic: a streamed call and its result"):
    with claude.messages.stream(**hi, tools=own_tools) as stream:
        list(stream)
        message = stream.get_final_message()
    use = message.content[-1]
    assert (use.type, use.input, message.stop_reason) == ("tool_use", ARGUMENTS, "tool_use")
    result = [{"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}]
    turns = [
        *hi["messages"],
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": result},
    ]
    assert claude.messages.create(**{**hi, "messages": turns}, tools=own_tools).content[-1].text == TEXT
with check("anthropic: tokens are counted"):
    counted = claude.messages.count_tokens(model=model, messages=hi["messages"], tools=own_tools)
    assert (
        counted.input_tokens > claude.messages.count_tokens(model=model, messages=hi["messages"]).input_tokens
    )
with check("anthropic: the models"):
    assert model in [each.id for each in claude.models.list()]
with check("anthropic: an error"):
    try:
        claude.messages.create(**{**hi, "model": "no-such-model"})
        raise AssertionError("it is not refused")
    except anthropic.NotFoundError as error:
        assert error.body["error"]["type"] == "not_found_error"

raise SystemExit(check.finish())
