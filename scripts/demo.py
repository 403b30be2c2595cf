"""Serves the bundled model, sends it a question, and prints the streamed answer, the experts' use, and an answer
in a required form."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

from shared.server_process import free_port

QUESTION = "Hi, I would like to see a movie tonight. Can you help me book tickets?"
REQUEST = "I want to book 2 tickets for the movie at 7 in the evening."
ORDER = {
    "type": "object",
    "properties": {
        "what": {"enum": ["movie", "restaurant", "hotel", "bus"]},
        "tickets": {"type": "integer", "minimum": 1, "maximum": 9},
        "time": {"type": "string", "pattern": "^[0-9]{1,2}:[0-9]{2} (am|pm)$"},
        "is_certain": {"type": "boolean"},
    },
    "required": ["what", "tickets", "time", "is_certain"],
    "additionalProperties": False,
}


def wait_ready(base: str, server: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with code {server.returncode}")
        try:
            urllib.request.urlopen(f"{base}/ready", timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit(f"the server was not ready after {seconds:.0f} s")


def ask(base: str, question: str, **fields: Any) -> str:
    """Prints a chat answer as its pieces arrive, then its token counts; returns its text."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 60,
        "temperature": 0.3,
        "seed": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"{base}/v1/chat/completions",
        json.dumps(body | fields).encode(),
        {"Content-Type": "application/json"},
    )
    print(f"user: {question}\nassistant:", end="", flush=True)
    text = ""
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            data = line.decode().removeprefix("data: ").strip()
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                text += piece
                print(piece, end="", flush=True)
            if event.get("usage"):
                print(f"\n\nusage: {event['usage']}")
    return text


def order(base: str) -> None:
    """Prints an answer whose form a JSON schema requires, and its fields as a program reads them."""
    print("\nthe same model, with a JSON schema that its answer must follow (response_format):")
    form = {"type": "json_schema", "json_schema": {"name": "order", "schema": ORDER, "strict": True}}
    answer = json.loads(ask(base, REQUEST, response_format=form, temperature=0))
    print("as a program reads it: " + ", ".join(f"{name} = {value!r}" for name, value in answer.items()))


def show_experts(base: str) -> None:
    """Prints one line per layer: its experts that a step touched, and the tokens of each of them."""
    with urllib.request.urlopen(f"{base}/moe/stats") as answer:
        stats = json.load(answer)
    shape = stats["model"]
    print(f"\nwhat the experts did ({shape['experts']} a layer, {shape['top_k']} a token):")
    for i in range(shape["layers"]):
        counts = [
            p + d for p, d in zip(stats["prefill"]["counts"][i], stats["decode"]["counts"][i], strict=True)
        ]
        most = max(counts) or 1
        bars = "".join(" ▁▂▃▄▅▆▇█"[-(-8 * c // most)] for c in counts)
        active = stats["decode"]["per_layer"][i]["active_experts"]
        print(f"  layer {i}: |{bars}| {active:.1f} experts a decode step, busiest {most} of {sum(counts)}")


def main() -> None:
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    print("starting jmoe serve (the first start compiles; later ones take seconds) ...", flush=True)
    server = subprocess.Popen(
        [sys.executable, "-m", "jmoe.cli", "serve", "tiny", "--port", str(port)], stderr=subprocess.DEVNULL
    )
    try:
        wait_ready(base, server)
        ask(base, " ".join(sys.argv[1:]) or QUESTION)
        show_experts(base)
        order(base)
    finally:
        server.terminate()
        server.wait(timeout=60)


if __name__ == "__main__":
    main()
