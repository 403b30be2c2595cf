"""Tests how ``jmoe bench serve`` reads the answers of any server, whole and streamed."""

import json

import pytest

from jmoe.tools.bench.answers import events, read_stream
from jmoe.tools.bench.http import HttpAnswer

EVENTS = b'data: {"a": 1}\n\n: a comment\r\n\r\ndata:{"b": 2}\r\n\r\ndata: [DONE]\n\n'


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_found_however_the_stream_was_cut(size):
    parts = [(float(i), EVENTS[i : i + size]) for i in range(0, len(EVENTS), size)]
    found = list(events(parts))
    assert [data for _, data in found] == [b'{"a": 1}', b'{"b": 2}', b"[DONE]"]
    first_end = EVENTS.index(b"\n")
    assert found[0][0] == first_end - first_end % size, "an event's time is that of its last byte"


def chunk(text, finish=None, **more):
    return json.dumps({"choices": [{"text": text, "finish_reason": finish, **more}]})


def streamed(*items: str, status: int = 200, asked: int = 10):
    parts = [(1.0 + i, f"data: {item}\n\n".encode()) for i, item in enumerate(items)]
    return read_stream(HttpAnswer(status, 0.5, parts), asked)


def test_half_a_character_is_a_token_and_an_empty_end_is_none():
    result = streamed(chunk("a"), chunk(""), chunk("é"), chunk("", "length"))
    assert (result.first_token_time, result.gaps, result.end_time) == (1.0, [1.0, 1.0], 4.0)
    assert result.output_tokens == 3 and not result.has_usage and result.cause is None


def test_a_chats_opening_is_not_its_first_token():
    def said(**delta):
        return json.dumps({"choices": [{"delta": delta, "finish_reason": None}]})

    end = json.dumps({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    result = streamed(said(role="assistant", content=""), said(content="a"), said(content="b"), end)
    assert (result.first_token_time, result.gaps) == (2.0, [1.0])


def test_usage_counts_before_events_do():
    usage = {"usage": {"prompt_tokens": 7, "completion_tokens": 4, "moe": {"assignments": 8, "remapped": 2}}}
    result = streamed(chunk("ab"), chunk("cd", "length"), json.dumps({"choices": [], **usage}))
    assert (result.input_tokens, result.output_tokens, result.has_usage) == (7, 4, True)
    assert result.moe == {"assignments": 8, "remapped": 2}


@pytest.mark.parametrize(
    ("items", "status", "cause"),
    [
        ([chunk("a")], 200, "the stream ended before its answer"),
        ([chunk("", "stop")], 200, "the answer holds no token"),
        ([chunk("a"), '{"error": {"message": "NaN"}}'], 200, "error in the stream: NaN"),
        (["nonsense"], 200, "an event is not a completion's chunk"),
        ([], 503, "HTTP 503: "),
        (
            [chunk("a"), chunk("b"), chunk("c", "length")],
            200,
            "the answer is longer than asked (3 tokens for 2)",
        ),
    ],
)
def test_what_is_no_answer_has_a_cause(items, status, cause):
    assert streamed(*items, status=status, asked=2).cause == cause
