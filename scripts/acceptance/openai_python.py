"""Sends every kind of request of the openai package to one server.  python openai_python.py BASE MODEL"""

import contextlib
import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import openai
from checks import Checks, frees, running
from pydantic import BaseModel

base, model = sys.argv[1:]
client = openai.OpenAI(base_url=f"{base}/v1", api_key="EMPTY", max_retries=0, timeout=120)
check = Checks()
PROMPT = "Question: A farmer has"
MESSAGES = [{"role": "user", "content": "Hi, two tickets please."}]
GREEDY = {"model": model, "temperature": 0, "max_tokens": 16}


class Ticket(BaseModel):
    kind: Literal["bus", "train", "plane"]
    count: Literal[1, 2, 3]
    urgent: bool


TOOL = {
    "type": "function",
    "function": {"name": "book", "description": "Books tickets", "parameters": Ticket.model_json_schema()},
}


def complete(**more):
    return client.completions.create(prompt=PROMPT, **GREEDY | more)


def chat(**more):
    return client.chat.completions.create(messages=MESSAGES, **GREEDY | more)


def streamed(events) -> str:
    return "".join(event.choices[0].text for event in events if event.choices)


def chat_streamed(events) -> str:
    return "".join(event.choices[0].delta.content or "" for event in events if event.choices)


def token_ids(text: str) -> list[int]:
    request = urllib.request.Request(
        f"{base}/tokenize",
        json.dumps({"prompt": text}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]


with check("models are listed and retrieved"):
    assert [m.id for m in client.models.list()] == [model] == [client.models.retrieve(model).id]

with check("greedy answers repeat"):
    assert complete().choices[0].text == complete().choices[0].text != ""

with check("a seed repeats, another does not"):
    texts = [complete(temperature=1, seed=seed, max_tokens=40).choices[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]

with check("a streamed completion is the whole one"):
    assert streamed(complete(stream=True)) == complete().choices[0].text

with check("a streamed chat is the whole one, its usage last"):
    whole = chat()
    events = list(chat(stream=True, stream_options={"include_usage": True}))
    assert chat_streamed(events) == whole.choices[0].message.content
    assert whole.choices[0].message.role == events[0].choices[0].delta.role == "assistant"
    assert events[-1].choices == [] and events[-1].usage.total_tokens == whole.usage.total_tokens
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert not any(event.usage for event in events[:-1])

with check("usage counts tokens"):
    usage = complete(max_tokens=5, extra_body={"ignore_eos": True}).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(token_ids(PROMPT)), 5)
    assert usage.total_tokens == usage.prompt_tokens + 5

with check("n for each of several prompts, in order"):
    prompts = [PROMPT, "Once upon a time"]
    answer = client.completions.create(prompt=prompts, n=2, **GREEDY)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    alone = [client.completions.create(prompt=p, **GREEDY).choices[0].text for p in prompts]
    assert [c.text for c in answer.choices] == [alone[0], alone[0], alone[1], alone[1]]

with check("a streamed chat of several choices keeps them apart"):
    texts = ["", "", ""]
    for event in chat(stream=True, n=3):
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
    assert set(texts) == {chat().choices[0].message.content}

with check("token ids are a prompt as its text is"):
    answer = client.completions.create(prompt=token_ids(PROMPT), **GREEDY)
    assert answer.choices[0].text == complete().choices[0].text

with check("echo with logprobs scores the prompt"):
    answer = complete(echo=True, logprobs=2, max_tokens=1)
    scores, count = answer.choices[0].logprobs, len(token_ids(PROMPT))
    assert answer.choices[0].text.startswith(PROMPT)
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.text_offset) == count + 1
    assert scores.token_logprobs[0] is None and all(p <= 0 for p in scores.token_logprobs[1:])
    assert all(len(top) >= 2 for top in scores.top_logprobs[1:])

with check("only the prompt is scored with max_tokens 0"):
    answer = complete(echo=True, logprobs=0, max_tokens=0)
    assert answer.usage.completion_tokens == 0 and answer.choices[0].text == PROMPT

with check("log-probabilities of a chat, with bytes"):
    answer = chat(logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert all(len(t.top_logprobs) >= 3 and t.logprob <= 0 for t in content)
    raw = b"".join(bytes(t.bytes or []) for t in content)
    assert raw.decode(errors="replace").startswith(answer.choices[0].message.content.rstrip("\ufffd"))
    greedy = [max(t.top_logprobs, key=lambda top: top.logprob).logprob for t in content]
    assert greedy == [t.logprob for t in content]

with check("a stop string ends the text before it"):
    long = {"max_tokens": 60, "extra_body": {"ignore_eos": True}}
    whole = complete(**long).choices[0].text
    word = whole[20:24]
    stopped = complete(**long, stop=[word]).choices[0]
    assert stopped.text == whole[: whole.index(word)] and stopped.finish_reason == "stop"

with check("a token that is biased away does not come"):
    first = token_ids(PROMPT + complete(max_tokens=1).choices[0].text)[-1]
    other = complete(max_tokens=1, logit_bias={str(first): -100}).choices[0].text
    assert other != complete(max_tokens=1).choices[0].text

with check("content in parts and a developer's message"):
    parts = [{"type": "text", "text": MESSAGES[0]["content"]}]
    answer = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **GREEDY)
    assert answer.choices[0].message.content == chat().choices[0].message.content
    said = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts * 2}]
    assert client.chat.completions.create(messages=said, **GREEDY).choices[0].message.content

with check("the stream helper"):
    with client.chat.completions.stream(messages=MESSAGES, **GREEDY) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == chat().choices[0].message.content

with check("json_schema is parsed"):
    answer = client.chat.completions.parse(
        messages=MESSAGES, response_format=Ticket, model=model, max_tokens=200
    )
    assert isinstance(answer.choices[0].message.parsed, Ticket)

with check("json_schema holds at temperature 2 and in a stream"):
    form = {"name": "t", "schema": Ticket.model_json_schema(), "strict": True}
    options = {
        "temperature": 2,
        "max_tokens": 200,
        "response_format": {"type": "json_schema", "json_schema": form},
    }
    for seed in range(5):
        Ticket.model_validate_json(chat(**options, seed=seed).choices[0].message.content)
        Ticket.model_validate_json(chat_streamed(chat(**options, seed=seed, stream=True)))

with check("a named and a required tool is called"):
    named = {"type": "function", "function": {"name": "book"}}
    for choice in (named, "required"):
        fields = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 200, "parallel_tool_calls": False}
        message = chat(**fields).choices[0].message
        (call,) = message.tool_calls
        assert call.type == "function" and call.id and call.function.name == "book"
        Ticket.model_validate_json(call.function.arguments)

with check("a tool's arguments are streamed"):
    arguments, names = "", []
    fields = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 200, "parallel_tool_calls": False}
    events = list(chat(**fields, stream=True))
    for event in events:
        for call in (event.choices and event.choices[0].delta.tool_calls) or []:
            names += [call.function.name] if call.function.name else []
            arguments += call.function.arguments or ""
    assert names == ["book"] and Ticket.model_validate_json(arguments)
    assert events[-1].choices[0].finish_reason in ("tool_calls", "stop")

with check("with tools alone the model speaks or calls"):
    for seed in range(5):
        choice = chat(tools=[TOOL], temperature=1, seed=seed, max_tokens=100).choices[0]
        assert choice.message.content or choice.message.tool_calls
        for call in choice.message.tool_calls or []:
            assert call.function.name == "book"
            assert choice.finish_reason == "length" or Ticket.model_validate_json(call.function.arguments)

with check("with tools and a form it calls or has the form"):
    form = {"name": "t", "schema": Ticket.model_json_schema(), "strict": True}
    shaped = {"type": "json_schema", "json_schema": form}
    choice = chat(tools=[TOOL], response_format=shaped, max_tokens=200).choices[0]
    assert choice.message.tool_calls or Ticket.model_validate_json(choice.message.content)

with check("tool_choice none lets the model speak"):
    message = chat(tools=[TOOL], tool_choice="none").choices[0].message
    assert message.content and not message.tool_calls

for wanted, status, param, code, send in [
    (openai.NotFoundError, 404, "model", "model_not_found", lambda: complete(model="gpt-9")),
    (openai.NotFoundError, 404, "model", "model_not_found", lambda: client.models.retrieve("gpt-9")),
    (openai.BadRequestError, 400, "max_tokens", None, lambda: complete(max_tokens=-2)),
    (openai.BadRequestError, 400, "temperature", None, lambda: complete(temperature=3)),
    (openai.BadRequestError, 400, "nonsense", None, lambda: complete(extra_body={"nonsense": 1})),
    (openai.BadRequestError, 400, "prompt", "context_length_exceeded",
     lambda: client.completions.create(prompt="word " * 9000, **GREEDY)),
    (openai.NotFoundError, 404, None, None, lambda: client.embeddings.create(model=model, input="x")),
]:  # fmt: skip
    with check(f"{wanted.__name__} for {param or 'an unknown path'}"):
        try:
            send()
        except wanted as error:
            assert (error.status_code, error.param) == (status, param) and error.type and error.message
            assert code is None or error.code == code
        else:
            raise AssertionError("no error")

with check("32 streams at once give one text"):
    want = complete(max_tokens=24).choices[0].text
    with ThreadPoolExecutor(32) as pool:
        texts = set(pool.map(lambda _: streamed(complete(max_tokens=24, stream=True)), range(32)))
    assert texts == {want}

with check("a stream that is closed frees its slot"):
    stream = complete(max_tokens=900, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    assert frees(base)

with check("an answer that nobody waits for frees its slot"):
    with contextlib.suppress(openai.APITimeoutError):
        complete(max_tokens=900, n=8, extra_body={"ignore_eos": True}, timeout=0.3)
    assert frees(base), running(base)

sys.exit(check.finish())
