"""Any JSON gets a 2xx or a 4xx in the envelope, and null means the same as an absent field."""

import copy
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.server.bodies import BODIES
from support.server.fake_engine import TEMPLATE, ByteCodec, FakeEngine, served


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    with served(FakeEngine(ByteCodec(), max_model_len=512), directory=directory) as client:
        yield client


def post(client, path, body):
    """Returns the status and the answer, without what differs between two equal requests."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post(path, content=raw, headers={"content-type": "application/json"})
    assert 200 <= response.status_code < 500, (raw[:2000], response.text)
    if response.status_code != 200:
        assert response.headers["content-type"] == "application/json"
        answer = response.json()
        error, is_anthropic = answer["error"], path.startswith("/v1/messages")
        assert set(answer) == ({"type", "error"} if is_anthropic else {"error"})
        assert set(error) == ({"type", "message"} if is_anthropic else {"message", "type", "param", "code"})
        assert error["type"] in ("invalid_request_error", "not_found_error")
        assert isinstance(error["message"], str)
        assert all(isinstance(error.get(k), str | None) for k in ("param", "code"))
    return response.status_code, response.text


def places(value, path=()):
    """Returns the paths of everything inside a JSON value, and of the value itself."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield from places(part, (*path, key))


def changed(body, path, change):
    """Returns a copy of ``body`` after ``change(container, key)`` at ``path``."""
    root = [copy.deepcopy(body)]
    container, key = root, 0
    for step in path:
        container, key = container[key], step
    change(container, key)
    return root[0]


def put(value):
    return lambda container, key: container.__setitem__(key, value)


OURS = re.compile(
    r'(cmpl-|resp_|msg_|rs_|fc_)[0-9a-f]{32}|(?<="id":")[0-9A-Za-z]{9}(?=")|"created(_at)?":[0-9]+'
)
NUMBERS = st.sampled_from([0, -1, 1, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, 5e-324])
LEAVES = (
    st.none() | st.booleans() | NUMBERS | st.text(max_size=6) | st.sampled_from(["", "\x00", "\ud800", "😀"])
)
JSON = st.recursive(
    LEAVES | st.floats(),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3),
    max_leaves=8,
)
QUIET = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("path", BODIES)
def test_good_bodies_are_good(client, path):
    assert post(client, path, BODIES[path])[0] == 200


@pytest.mark.parametrize("path", BODIES)
def test_any_json(client, path):
    @settings(max_examples=60, **QUIET)
    @given(JSON)
    def answers(value):
        post(client, path, value)

    answers()


@pytest.mark.parametrize("path", BODIES)
def test_mutated_bodies(client, path):
    """A good body with another value, or with one more, in any place gets a 2xx or a 4xx."""

    @settings(max_examples=200, **QUIET)
    @given(st.data())
    def answers(data):
        body = BODIES[path]
        for _ in range(data.draw(st.integers(1, 3))):
            where = data.draw(st.sampled_from(list(places(body))))
            value = data.draw(JSON)
            new = data.draw(st.text(max_size=4))
            more = data.draw(st.booleans())

            def change(container, key, value=value, new=new, more=more):
                inside = container[key]
                if more and isinstance(inside, dict):
                    inside[new] = value
                elif more and isinstance(inside, list):
                    inside.append(value)
                else:
                    container[key] = value

            body = changed(body, where, change)
        post(client, path, body)

    answers()


@pytest.mark.parametrize("path", BODIES)
def test_deep_nesting_anywhere(client, path):
    for where in places(BODIES[path]):
        for depth, bracket in ((200, "["), (200, '{"a":'), (50_000, "["), (50_000, '{"a":')):
            closing = ("]" if bracket == "[" else "}") * depth
            marked = json.dumps(changed(BODIES[path], where, put("@@"))).replace(
                '"@@"', bracket * depth + "1" + closing
            )
            post(client, path, marked.encode())


@pytest.mark.parametrize("path", BODIES)
def test_null_is_absent(client, path):
    """Null in a named field means the same as no field.

    This is not so for the keys of maps and schemas and the content of a list, because these are data.
    """
    data = {"logit_bias", "metadata", "chat_template_kwargs", "schema", "parameters"}
    for where in places(BODIES[path]):
        if (
            not where
            or isinstance(where[-1], int)
            or data.intersection(where[:-1])
            or "content" in where[:-1]
        ):
            continue
        null = changed(BODIES[path], where, put(None))
        absent = changed(BODIES[path], where, lambda container, key: container.pop(key))
        first, second = post(client, path, null), post(client, path, absent)
        assert first[0] == second[0], (where, first[1], second[1])
        if first[0] == 200:
            assert OURS.sub("", first[1]) == OURS.sub("", second[1]), where
