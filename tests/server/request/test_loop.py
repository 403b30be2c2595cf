"""Nothing on the event loop takes longer than 50 ms, whatever a client sends.

The bodies have up to 8 MiB; some are refused and some are not. The codec is cheap, so that the tests measure
only our own code.
"""

import asyncio
import json
import re
from pathlib import Path

import msgspec
import pytest
from support.server.fake_engine import TEMPLATE, ByteCodec, FakeEngine
from support.server.loop_watch import served_here, unheld
from support.server.raw_http import ask, events, post

from jmoe.server.answer.info_replies import Models, Tokens
from jmoe.server.answer.pieces import encoded, joined
from jmoe.server.answer.replies import Delta
from jmoe.server.errors import ApiError
from jmoe.server.request import bounds, structured
from jmoe.server.request.bounds import check_json, exceeds

SIZE = 8 * 1024 * 1024 - 400
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PART = {"type": "text", "text": "a"}
USER = {"role": "user", "content": "a"}


class QuickCodec(ByteCodec):
    """A codec that makes a token of four bytes and takes almost no time."""

    def encode(self, text, *, special=True, limit=None):
        return [97] * (len(text) // 4 + 1)

    def token_starts(self, text, *, special=True):
        return [4 * i for i in range(len(text) // 4 + 1)]

    def decode(self, ids, *, skip_special=True):
        return "a" * len(ids)


def fill(start: str, item: str, between: str, end: str) -> bytes:
    count = (SIZE - len(start) - len(end)) // (len(item) + len(between))
    return (start + between.join([item] * count) + end).encode()


def tool(i: int) -> dict:
    return {"type": "function", "function": {"name": f"f{i}", "description": "d" * 60_000}}


def call(arguments: str) -> dict:
    return {
        "role": "assistant",
        "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": arguments}}],
    }


def grammar(kind: str, value) -> dict:
    return {"prompt": "a", "max_tokens": 2, "structured_outputs": {kind: value}}


REFUSED = {
    "a prompt": (COMPLETIONS, fill('{"prompt":"', "a", "", '"}'), "context length"),
    "lists": (COMPLETIONS, fill('{"prompt":[', "[1]", ",", "]}"), "lists and objects"),
    "ids": (COMPLETIONS, fill('{"prompt":[', "1", ",", "]}"), "values"),
    "fewer ids": (COMPLETIONS, json.dumps({"prompt": [7] * 900_000}), "context length"),
    "texts": (COMPLETIONS, fill('{"prompt":[', '"ab"', ",", "]}"), "strings"),
    "messages": (CHAT, fill('{"messages":[', json.dumps(USER), ",", "]}"), "strings"),
    "fewer messages": (CHAT, json.dumps({"messages": [USER] * 9000}), "length <= 8192"),
    "a schema": (COMPLETIONS, json.dumps(grammar("json", {"enum": ["ab" * 40] * 90_000})), "limit is 65536"),
    "tools": (
        CHAT,
        json.dumps({"messages": [USER], "tool_choice": "required", "tools": [tool(i) for i in range(128)]}),
        "tools hold more",
    ),
    "choices": (COMPLETIONS, json.dumps(grammar("choice", ["c" * 8000] * 1000)), "limit is 65536"),
    "biases": (
        COMPLETIONS, json.dumps({"prompt": "a", "logit_bias": {str(i): 1 for i in range(60_000)}}), "256"
    ),
    "stops": (COMPLETIONS, json.dumps({"prompt": "a", "stop": ["st"] * 120_000}), "stop"),
    "depth": (COMPLETIONS, b'{"prompt":"a","chat_template":' + b"[" * SIZE, "lists and objects"),
    "keys": (
        COMPLETIONS,
        b'{"prompt":"a","metadata":{' + b",".join(b'"%x":"1"' % i for i in range(600_000)) + b"}}",
        "",
    ),
    "half a surrogate": (COMPLETIONS, fill('{"prompt":"', "\\ud83d\\ude00", "", '\\ud83d"}'), "surrogate"),
    "a long name": (COMPLETIONS, fill('{"', "a", "", '":1}'), "Unrecognized"),
    "digits": (COMPLETIONS, fill('{"prompt":"a","seed":', "1", "", "}"), "seed"),
    "arguments": (
        CHAT, json.dumps({"messages": [call(json.dumps({str(i): 1 for i in range(400_000)}))]}), "arguments"
    ),
}  # fmt: skip


async def measured(port: int, path: str, body) -> tuple[int, bytes]:
    raw = body.encode() if isinstance(body, str) else body
    return await unheld(lambda: ask(port, post(path, raw)))


def run(work, **settings):
    """Returns a function that runs ``work(port, server)`` on a server with the other tests' chat template."""

    async def serve(directory: Path):
        engine = FakeEngine(QuickCodec(), max_model_len=65_536)
        async with served_here(engine, directory, **settings) as (port, server):
            return await asyncio.wait_for(work(port, server), 300)

    return serve


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_too_much_is_refused_before_it_takes_time(directory, case):
    path, body, words = REFUSED[case]
    status, answer = asyncio.run(run(lambda port, server: measured(port, path, body))(directory))
    assert status == 400 and words in json.loads(answer)["error"]["message"]


ANSWERED = {
    "token names": ("/tokenize", {"prompt": "!?" * 2**20, "return_token_strs": True}),
    "ids to text": ("/detokenize", {"tokens": [97] * 500_000}),
    "a long conversation": (CHAT, {"messages": [USER] * 8000, "max_tokens": 2}),
    "parts": (CHAT, {"messages": [{**USER, "content": [PART] * 15_000}], "max_tokens": 2}),
    # A large engine runs this many at once. The fake one runs all, and each step's tokens come together.
    "many prompts": (COMPLETIONS, {"prompt": [[7] * 2000] * 250, "max_tokens": 2}),
    "a long echo": (
        COMPLETIONS, {"prompt": [97] * 8_000, "max_tokens": 1, "logprobs": 20, "echo": True}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ANSWERED)
def test_what_is_much_is_answered_without_holding_up_the_loop(directory, case):
    path, body = ANSWERED[case]
    status, _ = asyncio.run(run(lambda port, server: measured(port, path, json.dumps(body)))(directory))
    assert status == 200


def test_a_large_answer_is_the_same_in_pieces(directory, monkeypatch):
    """A large answer is the same in pieces, whole and as a stream; a light one is made at once.

    The large answer has 40 choices with log-probabilities.
    """
    body = {"prompt": "abcd" * 20, "n": 40, "max_tokens": 30, "logprobs": 3, "echo": True, "seed": 1}

    async def in_pieces(port, server):
        whole = json.loads((await measured(port, COMPLETIONS, json.dumps(body)))[1])
        sent = events((await measured(port, COMPLETIONS, json.dumps(body | {"stream": True})))[1])
        return whole, sent

    async def at_once(port, server):  # it may hold the loop
        return json.loads((await ask(port, post(COMPLETIONS, json.dumps(body).encode())))[1])

    heavy, sent = asyncio.run(run(in_pieces)(directory))
    monkeypatch.setattr("jmoe.server.answer.delivery.HEAVY", 10**9)
    light = asyncio.run(run(at_once)(directory))
    assert heavy["choices"] == light["choices"] and heavy["usage"] == light["usage"]
    for choice in heavy["choices"]:
        parts = [
            e["choices"][0] for e in sent if e["choices"] and e["choices"][0]["index"] == choice["index"]
        ]
        assert "".join(p["text"] for p in parts) == choice["text"]
        assert [t for p in parts for t in p["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]


def test_work_of_many_bytes_waits_for_its_turn(directory):
    """Work of many bytes waits for its turn, and small work never waits for it.

    Two pieces of work of a few 10 kB, or one larger piece, run at a time. The test holds the first ones until
    there is no more room.
    """
    most, room = {}, {"small": 5, "middle": 2, "large": 1}

    async def work(port, server):
        service, at_once, full = server.service, dict.fromkeys(room, 0), asyncio.Event()
        read = service.in_thread

        async def counted(function, *given):
            if not (given and isinstance(given[0], bytes)):
                return await read(function, *given)
            size = len(given[0])
            name = "small" if size < bounds.LIGHT else "middle" if size < 256 * 1024 else "large"
            at_once[name] += 1
            most[name] = max(most.get(name, 0), at_once[name])
            if at_once == room:
                full.set()
            try:
                await full.wait()
                await asyncio.sleep(0.05)  # time for one that does not wait for its turn
                return await read(function, *given)
            finally:
                at_once[name] -= 1

        service.in_thread = counted
        bodies = [
            {"prompt": "a", "max_tokens": 1, "user": "u" * n} for n in (10, 50_000, 300_000) for _ in "12345"
        ]
        answers = await asyncio.gather(*(ask(port, post(COMPLETIONS, body)) for body in bodies))
        assert {status for status, _ in answers} == {200}

    asyncio.run(run(work)(directory))
    assert most == room


def scanned(text: str) -> str | None:
    try:
        check_json(text.encode())
    except ApiError as error:
        return error.message
    return None


@pytest.mark.parametrize("many", [",", ":", "[", "{", '"', '\\"', "\\\\"])
def test_what_stands_in_a_string_is_no_structure(many):
    text = json.dumps(["x" * 3 + many.replace('\\"', '"') * 600_000, "[" * 40_000])
    assert scanned(text) is None
    end = bounds.COUNTED_BYTES
    for piece in (end - 1, end, end + 1):
        start = json.dumps("y" * (piece - 3))
        for end in ('\\"', "\\\\", "\\\\\\"):
            text = f'[{start[:-1]}{end}{"" if end != chr(92) * 3 else chr(34)}", "{"[" * 40_000}"]'
            assert json.loads(text) and scanned(text) is None


def test_the_bounds_are_exact():
    value = json.dumps([0] * (bounds.MAX_JSON_VALUES + 1))
    assert scanned(value) is None and "values" in scanned(f"[0,{value}]")
    lists = json.dumps([[]] * (bounds.MAX_JSON_LISTS - 1))
    assert scanned(lists) is None and "lists" in scanned(f"[{lists}]")
    keys = json.dumps({f"{i:x}": 0 for i in range(bounds.MAX_JSON_KEYS)})
    assert scanned(keys) is None and "keys" in scanned(f'[{{"a":0}},{keys}]')
    strings = json.dumps(["ab"] * bounds.MAX_JSON_STRINGS)
    assert scanned(strings) is None and "strings" in scanned(f'["a",{strings}]')


@pytest.mark.parametrize("value", [{"a": ["b" * 90]}, ["x"] * 60, {"k" * 99: 1}, [[[[]]]] * 30, "y" * 101])
def test_exceeds_never_overestimates(value):
    size = len(json.dumps(value, separators=(",", ":")))
    assert not exceeds(value, size) and exceeds(value, size // 4)


def test_pieces_are_the_whole():
    entry = {"token": 'a"é', "logprob": -0.5, "bytes": [1, 2], "top": [{"t": "b"}] * 3}
    for value in (
        {}, [], {"a": {}}, {"a": [], "b": [{}]}, [1] * 1000, {"c": [{"d": {"e": [entry] * 200}}] * 3},
        {"tokens": list(range(300)), "names": ["x"] * 300},
    ):  # fmt: skip
        pieces = list(encoded(value))
        assert json.loads(b"".join(pieces)) == value
        assert b"".join(joined(pieces)) == b"".join(pieces)


@pytest.mark.parametrize(
    "struct",
    [
        Delta(),
        Delta(content=None),
        Delta(content="a", tool_calls=[]),
        Tokens(count=0, max_model_len=8, tokens=[]),
        Tokens(count=300, max_model_len=8, tokens=[*range(300)], token_strs=["é"] * 300),
        Models("list", [], False, "", ""),
    ],
)
def test_pieces_of_a_struct_are_its_bytes(struct):
    assert b"".join(encoded(struct)) == msgspec.json.encode(struct)


def test_a_schema_of_any_size_is_looked_at_no_further_than_its_limit(monkeypatch):
    monkeypatch.setattr(structured, "schema_grammar", lambda schema: pytest.fail("it was written"))
    with pytest.raises(ValueError, match="the limit is 65536"):
        structured.bounded({"enum": ["ab"] * 10**6})


def test_the_documents_table_has_every_bound():
    page = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
    table = page.partition("## How much a request may hold")[2].partition("\n## ")[0]
    numbers = {int(text.replace(",", "")) for text in re.findall(r"[\d,]*\d", table)}
    named = {name: value for name, value in vars(bounds).items() if name.startswith("MAX_")}
    missing = {name: value for name, value in named.items() if value not in numbers}
    assert len(named) > 6 and not missing
