"""Serves the bundled model, asks it, and prints a streamed answer, the experts' use, and one as JSON."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

from shared.server_process import free_port

QUESTION = "Hi, I would like to see a movie tonight. Can you help me book tickets?"
ORDER = {
    "type": "object",
    "properties": {
        "intent": {"enum": ["book movie tickets", "reserve a table", "order a taxi"]},
        "tickets": {"type": "integer", "minimum": 1, "maximum": 9},
        "evening": {"type": "boolean"},
    },
    "required": ["intent", "tickets", "evening"],
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


def ask(base: str, question: str) -> None:
    """Prints a chat answer as its pieces arrive, then its token counts."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 60,
        "temperature": 0.3,
        "seed": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"{base}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    print(f"user: {question}\nassistant:", end="", flush=True)
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            data = line.decode().removeprefix("data: ").strip()
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            for choice in event["choices"]:
                print(choice["delta"].get("content", ""), end="", flush=True)
            if event.get("usage"):
                print(f"\n\nusage: {event['usage']}")


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


def show_order(base: str, question: str) -> None:
    """Prints the answer to the question in the form of a JSON schema, as a program reads it."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 400,  # more than the longest JSON of this schema
        "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": {"name": "order", "schema": ORDER}},
    }
    request = urllib.request.Request(
        f"{base}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        (choice,) = json.load(answer)["choices"]
    print("\nthe same question, answered in the form of a JSON schema (response_format), for a program:")
    print(f"user: {question}\nassistant: {json.dumps(json.loads(choice['message']['content']))}")


def main() -> None:
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    print("starting jmoe serve (the first start compiles; later ones take seconds) ...", flush=True)
    server = subprocess.Popen(
        [sys.executable, "-m", "jmoe.cli", "serve", "tiny", "--port", str(port)], stderr=subprocess.DEVNULL
    )
    try:
        wait_ready(base, server)
        question = " ".join(sys.argv[1:]) or QUESTION
        ask(base, question)
        show_experts(base)
        show_order(base, question)
    finally:
        server.terminate()
        server.wait(timeout=60)


if __name__ == "__main__":
    main()
