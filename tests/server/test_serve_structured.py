"""Tests structured answers of the bundled model: other libraries accept every answer that ends."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
from starlette.testclient import TestClient

from jmoe import LLM, Grammar, SamplingParams
from jmoe.engine.deployment.settings import model_directory
from jmoe.engine.worker import EngineWorker
from jmoe.server.app import make_app
from jmoe.server.service import Service
from jmoe.server.settings import ServerSettings

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Two tickets to Paris, please."}]
TRIP = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome", "São Paulo"]},
        "tickets": {"type": "integer", "minimum": 1, "maximum": 99},
        "notes": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
    },
    "required": ["city", "tickets"],
    "additionalProperties": False,
}
TIME = r"(0\d|1[0-9]|2[0-3]):[0-5]\d( (late|early))?"
TOOLS = [
    {"type": "function", "function": {"name": "book", "parameters": TRIP}},
    {"type": "function", "function": {"name": "refuse"}},
]


@pytest.fixture(scope="module")
def llm():
    with LLM("tiny", dtype="float32", warm_up=False, max_num_seqs=4, max_model_len=512) as llm:
        yield llm


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_follow_their_grammar(llm, temperature):
    params = SamplingParams(max_tokens=400, temperature=temperature, seed=5)
    prompts = ["Ticket office: ", "Once upon a time", "def main():"]
    for output in llm.generate(prompts, params, grammar=Grammar("json_schema", json.dumps(TRIP))):
        jsonschema.validate(json.loads(output.outputs[0].text), TRIP)
        assert output.outputs[0].finish_reason == "stop"
    for output in llm.generate(prompts, params, grammar=Grammar("regex", TIME)):
        assert re.fullmatch(TIME, output.outputs[0].text) and output.outputs[0].finish_reason == "stop"


def test_answers_without_a_grammar_are_as_before(llm):
    params = SamplingParams(max_tokens=12, temperature=0.0)
    before = llm.generate(["Once upon a time"], params)[0].outputs[0].token_ids
    llm.generate(["Once upon a time"], params, grammar=Grammar("regex", "[xyz]+"))
    assert llm.generate(["Once upon a time"], params)[0].outputs[0].token_ids == before


def test_log_probabilities_are_those_of_the_model(llm):
    """Log-probabilities are the unmodified distribution's, for forbidden tokens and the chosen one."""
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=5)
    free = llm.generate(["Once upon a time"], params)[0].outputs[0].logprobs[0]
    forced = (
        llm.generate(["Once upon a time"], params, grammar=Grammar("regex", "Q"))[0].outputs[0].logprobs[0]
    )
    assert forced.token_id != free.token_id and forced.logprob < free.logprob
    assert forced.top[:5] == free.top[:5]


def test_a_bad_grammar_is_one_line(llm):
    with pytest.raises(ValueError, match="unclosed group") as refusal:
        llm.generate(["x"], grammar=Grammar("regex", "a(b"))
    assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def client(llm):
    worker = EngineWorker(llm.engine)
    worker.start()
    service = Service(worker, ServerSettings(), Path(model_directory("tiny")), "tiny")
    with TestClient(make_app(service)) as client:
        yield client
    service.grammars.close()
    worker.close()


def test_http_answers_follow_their_schema(client):
    form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": TRIP, "strict": True}}
    answer = client.post(CHAT, json={"messages": USER, "response_format": form, "n": 2, "seed": 1}).json()
    for choice in answer["choices"]:
        jsonschema.validate(json.loads(choice["message"]["content"]), TRIP)
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "book"}}])
def test_calls_have_valid_arguments(client, choice):
    body = {"messages": USER, "tools": TOOLS, "tool_choice": choice, "seed": 2}
    answer = client.post(CHAT, json=body).json()["choices"][0]
    (call,) = answer["message"]["tool_calls"]
    schema = {"book": TRIP, "refuse": {"type": "object", "maxProperties": 0}}[call["function"]["name"]]
    jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
    assert answer["finish_reason"] == ("tool_calls" if choice == "required" else "stop")
