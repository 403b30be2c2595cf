"""A route is one declaration, which the code that serves, guards, logs, traces and describes it reads."""

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import Response
from support.server.fake_engine import ByteCodec, FakeEngine, served

from jmoe.server import app
from jmoe.server.answer import info_replies
from jmoe.server.errors import json_response
from jmoe.server.route_record import JSON, Route
from jmoe.server.routes import table
from jmoe.server.routes.table import ROUTES
from jmoe.server.service import Service
from jmoe.server.watch.answered import Answered

KEY = {"authorization": "Bearer secret"}


async def new(service: Service, request: Request) -> Response:
    return json_response({"status": "ok"})


NEW = Route("GET", "/new", new, "A new one", {JSON: info_replies.Status})


def names(fact: str) -> dict[str, object]:
    """Returns the routes that have a fact, with its value."""
    return {route.pattern: getattr(route, fact) for route in ROUTES if getattr(route, fact)}


def test_the_facts_are_those_that_users_rely_on():
    probes = names("is_probe").keys()
    assert probes == {"/live", "/ready", "/health", "/ping"}
    assert names("is_open").keys() == probes | {"/dashboard", "/moe"}
    assert names("is_quiet").keys() == probes | {"/metrics"}
    chats = ("/v1/chat/completions", "/v1/responses", "/v1/messages")
    assert names("operation") == {"/v1/completions": "text_completion", **dict.fromkeys(chats, "chat")}
    assert names("body").keys() == names("example").keys() == {r.path for r in ROUTES if r.method == "POST"}
    assert names("pattern").keys() - names("summary").keys() == {"/moe/events"}
    assert "/v1/models/{id}" in names("pattern")


def test_no_route_is_there_twice_and_open_ones_are_plain_paths():
    assert len({(route.method, route.pattern) for route in ROUTES}) == len(ROUTES)
    assert not [path for path in names("is_open") if "{" in path]


def test_every_route_is_served_and_described():
    with served(FakeEngine(ByteCodec())) as client:
        described = client.get("/openapi.json").json()["paths"]
        there = [(route.path, route.methods - {"HEAD"}) for route in client.app.app.app.routes]
    assert there == [(route.path, {route.method}) for route in ROUTES]
    assert [(path, method) for path, methods in described.items() for method in methods] == [
        (route.pattern, route.method.lower()) for route in ROUTES if route.summary is not None
    ]


@pytest.mark.parametrize("is_set", [False, True])
def test_a_new_route_is_one_declaration(is_set, monkeypatch, caplog):
    route = replace(NEW, is_open=is_set, is_quiet=is_set, operation="new" if is_set else None)
    for module in (app, table):
        monkeypatch.setattr(module, "ROUTES", (*ROUTES, route))
    caplog.set_level(logging.INFO)
    answers: list[Answered] = []
    with served(FakeEngine(ByteCodec()), api_key="secret") as client:
        client.service.observers.append(answers.append)
        assert client.get("/new").status_code == (200 if is_set else 401)
        assert client.get("/new/", headers=KEY).json() == {"status": "ok"}
        assert "did you mean /new?" in client.get("/v1/new", headers=KEY).json()["error"]["message"]
        described = client.get("/openapi.json", headers=KEY).json()["paths"]["/new"]["get"]
    assert described["summary"] == "A new one" and ("security" in described) != is_set
    assert (answers[1].pattern, answers[1].route) == ("/new", route)
    logged = [record.fields["route"] for record in caplog.records if record.message == "answered"]
    assert ("/new" in logged) != is_set


def test_the_manual_lists_every_route_and_those_that_need_no_key():
    text = (Path(__file__).parents[3] / "docs/api.md").read_text()
    table, _, after = text.partition("## Routes")[2].partition("\n\nA slash")
    listed = set(re.findall(r"(/[\w./{}]+)`", table))
    assert listed == {route.pattern for route in ROUTES}
    [without_key] = re.findall(r"every route except (.*?) needs", after, re.S)
    assert set(re.findall(r"`(.+?)`", without_key)) == names("is_open").keys()
