"""Checks of the application's answers: an error in its envelope, or a stream of events to its end."""

import json

VALUE, UNSUPPORTED = "invalid_value", "unsupported_parameter"


def check(response, status, param=None, code=None):
    """Returns the message of a refusal; asserts its envelope, field and code."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert (error["param"], error["code"]) == (param, code), error
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return error["message"]


def events(response):
    """Returns the objects of a stream, which must end with ``[DONE]``."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines[:-1]]


def named_events(response):
    """Returns the data of a stream of named events; asserts that each name is the data's type."""
    made = []
    for block in response.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        made.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {made[-1]['type']}"
    return made
