"""A server's report of itself: its model, its context, token ids of text, and its prefix cache."""

import re
from dataclasses import dataclass

import msgspec

from jmoe.tools.bench.answers import read_json
from jmoe.tools.bench.http import Client, Failure

PREFIX = re.compile(r"^(?:jmoe_|vllm:)prefix_cache_(queries|hits)_total(?:\{[^}]*\})? (\S+)$", re.M)


@dataclass(frozen=True)
class ServedModel:
    """A served model.

    context: limit on the tokens of prompt and answer; None = not reported.
    """

    name: str
    context: int | None


async def served_model(client: Client, name: str | None) -> ServedModel:
    """Returns the model called ``name``, or without a name the only one; it raises ValueError if there is not
    exactly one. With a name, the server need not list the model."""
    answer = await client.send("GET", "/v1/models")
    if name is not None and answer.status != 200:
        return ServedModel(name, None)
    listed = read_json(answer, "/v1/models").get("data", [])
    names: list[str] = [entry["id"] for entry in listed]
    if name is None:
        if len(names) != 1:
            raise ValueError(f"the server has {len(names)} models: give --model, one of {', '.join(names)}")
        (name,) = names
    entry = next((e for e in listed if e["id"] == name), {})
    return ServedModel(name, entry.get("max_model_len"))


async def tokenize(client: Client, model: str, text: str) -> list[int]:
    """Returns the token ids of ``text`` from the server's /tokenize. It raises Failure if the server has no
    /tokenize."""
    body = msgspec.json.encode({"model": model, "prompt": text, "add_special_tokens": False})
    return read_json(await client.send("POST", "/tokenize", body), "/tokenize")["tokens"]


async def prefix_counts(client: Client) -> dict[str, float] | None:
    """Returns the prompt tokens looked up and found in the prefix cache so far; None if /metrics does not
    report them."""
    try:
        answer = await client.send("GET", "/metrics")
    except Failure:
        return None
    if answer.status != 200:
        return None
    counts: dict[str, float] = {}
    for name, value in PREFIX.findall(answer.body.decode(errors="replace")):
        counts[name] = counts.get(name, 0.0) + float(value)
    return counts if len(counts) == 2 else None


def hit_rate(before: dict[str, float] | None, after: dict[str, float] | None) -> float | None:
    """Returns the share of found tokens among those looked up in between; None if none were looked up."""
    if before is None or after is None or after["queries"] <= before["queries"]:
        return None
    return (after["hits"] - before["hits"]) / (after["queries"] - before["queries"])
