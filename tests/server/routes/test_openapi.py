"""The OpenAPI document is true: every answer has its stated form, and every route and status is in it."""

import json

import jsonschema
import msgspec
import pytest
from support.server.answers import events, named_events
from support.server.bodies import BODIES
from support.server.fake_engine import TEMPLATE, ByteCodec, FakeEngine, served

from jmoe.server.request.fields.base import neutral
from jmoe.server.request.schema import ChatRequest, CompletionRequest
from jmoe.server.route_record import EVENTS, JSON
from jmoe.server.routes.table import ROUTES

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    with served(FakeEngine(ByteCodec(), max_model_len=512), directory=directory) as client:
        yield client


@pytest.fixture(scope="module")
def document(client):
    return client.get("/openapi.json").json()


def operation_of(document, path, method):
    known = path if path in document["paths"] else path.rpartition("/")[0] + "/{id}"
    return document["paths"][known][method.lower()]


def check_answer(document, response):
    """Checks that the response's status is in the document and that its JSON has the stated form."""
    operation = operation_of(document, response.request.url.path, response.request.method)
    kind = response.headers["content-type"].partition(";")[0]
    schema = operation["responses"][str(response.status_code)]["content"][kind]["schema"]
    if kind == "application/json":
        rooted(document, schema).validate(response.json())
    return kind


def rooted(document, schema):
    """Returns a validator of the schema, which refers to the document's components."""
    text = json.dumps({"$defs": document["components"]["schemas"], **schema})
    return jsonschema.Draft202012Validator(json.loads(text.replace("#/components/schemas/", "#/$defs/")))


GOOD = [
    ("/v1/completions", {"prompt": "ab", "max_tokens": 2}),
    (
        "/v1/completions",
        {"prompt": "abc", "echo": True, "logprobs": 2, "stop": "c", "return_token_ids": True},
    ),
    (CHAT, {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2}),
    *((path, {k: v for k, v in body.items() if not k.startswith("stream")}) for path, body in BODIES.items()),
]


@pytest.mark.parametrize(("path", "body"), GOOD)
def test_answers_are_as_the_document_says(client, document, path, body):
    described = operation_of(document, path, "POST")["requestBody"]["content"]["application/json"]
    rooted(document, described["schema"]).validate(body)
    response = client.post(path, json=body)
    assert response.status_code == 200 and check_answer(document, response) == "application/json"


@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
def test_events_are_as_the_document_says(client, document, path):
    response = client.post(path, json=BODIES[path])
    assert check_answer(document, response) == "text/event-stream"
    content = operation_of(document, path, "POST")["responses"]["200"]["content"]["text/event-stream"]
    chunk = rooted(document, content["schema"]["properties"]["data"]["anyOf"][1]["contentSchema"])
    for event in events(response):
        chunk.validate(event)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_named_events_are_as_the_document_says(client, document, path):
    route = next(route for route in ROUTES if route.path == path)
    response = client.post(path, json=BODIES[path])
    content = operation_of(document, path, "POST")["responses"]["200"]["content"]["text/event-stream"]
    chunk = rooted(document, content["schema"]["properties"]["data"]["contentSchema"])
    for event in named_events(response):
        chunk.validate(event)
        data = msgspec.json.encode(event)
        assert msgspec.json.encode(msgspec.json.decode(data, type=route.answers[EVENTS])) == data
    whole = client.post(path, json=BODIES[path] | {"stream": False}).content
    assert msgspec.json.encode(msgspec.json.decode(whole, type=route.answers[JSON])) == whole


@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
def test_answers_are_the_structs_of_the_document(client, path):
    """An answer has the same bytes after it is read as the struct that the table names and written again."""
    route = next(route for route in ROUTES if route.path == path)
    stream = client.post(path, json=BODIES[path])
    for line in stream.content.split(b"\n\n")[:-2]:
        data = line.removeprefix(b"data: ")
        assert msgspec.json.encode(msgspec.json.decode(data, type=route.answers[EVENTS])) == data
    answer = client.post(path, json={k: v for k, v in BODIES[path].items() if not k.startswith("stream")})
    assert answer.status_code == 200
    read = msgspec.json.decode(answer.content, type=route.answers[JSON])
    assert msgspec.json.encode(read) == answer.content


@pytest.mark.parametrize("path", [
    "/live", "/ready", "/health", "/ping", "/version", "/metrics", "/moe/stats", "/openapi.json",
    "/v1/models", "/v1/models/fake", "/v1/models/other", "/v1/responses/other",
])  # fmt: skip
def test_other_answers_are_as_the_document_says(client, document, path):
    check_answer(document, client.get(path))


def test_errors_are_as_the_document_says(client, document):
    for path, body in BODIES.items():
        for sent in ({"json": {}}, {"json": body | {"model": "other"}}, {"content": b"{}"}):
            response = client.post(path, **sent)
            assert response.status_code in (400, 404, 415)
            check_answer(document, response)


def test_examples_work(client, document):
    for path, methods in document["paths"].items():
        body = methods.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json")
        if body is not None:
            assert client.post(path, json=body["example"]).status_code == 200


def test_fields_of_one_value_are_described(client, document):
    """The schema allows the same values of these fields as the server."""
    for path, kind in (("/v1/completions", CompletionRequest), (CHAT, ChatRequest)):
        base = {"prompt": "a"} if kind is CompletionRequest else {"messages": BODIES[CHAT]["messages"][:2]}
        described = document["components"]["schemas"][kind.__name__]["properties"]
        for field, values in neutral(kind).items():
            assert described[field]["enum"] == [None, *values]
            for value in described[field]["enum"]:
                assert client.post(path, json={**base, "max_tokens": 1, field: value}).status_code == 200


def test_a_key_is_described():
    with served(FakeEngine(ByteCodec()), api_key="secret") as client:
        document = client.get("/openapi.json", headers={"authorization": "Bearer secret"}).json()
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                response = client.request(method, path.replace("{id}", "fake"))
                guarded = response.status_code == 401
                assert guarded == ("security" in operation) == ("401" in operation["responses"])
                if guarded:
                    error = operation["responses"]["401"]["content"]["application/json"]["schema"]
                    rooted(document, error).validate(response.json())
    assert document["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}


def test_the_check_can_fail(client, document):
    """An answer with one field more, or one less, does not fit the document."""
    answer = client.post("/tokenize", json={"prompt": "a"}).json()
    schema = rooted(document, {"$ref": "#/components/schemas/Tokens"})
    schema.validate(answer)
    for wrong in (answer | {"more": 1}, {k: v for k, v in answer.items() if k != "count"}):
        with pytest.raises(jsonschema.ValidationError):
            schema.validate(wrong)
