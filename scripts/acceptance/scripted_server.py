"""The real server over a scripted engine, for clients that call tools, which a small model does not.

    python scripted_server.py PORT [--thinks]

The engine answers a conversation whose tools include a known one with a call of it, and one that ends with a
tool's result with text. Its tokenizer is the bundled model's; its template is that of Hermes and Qwen3.
--thinks: every answer begins with thoughts.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jmoe.engine.deployment.settings import model_directory
from jmoe.engine.reports import EngineSnapshot, Listener, ModelFacts
from jmoe.engine.request import Output, Request
from jmoe.engine.text.codec import TextCodec, load_codec
from jmoe.engine.text.detokenizer import Detokenizer
from jmoe.server.run import serve
from jmoe.server.settings import ServerSettings

CALLS: dict[str, dict[str, Any]] = {  # the arguments of each known tool
    "get_weather": {"city": "Paris"},
    "exec_command": {"cmd": "echo hello-from-tool"},
    "shell_command": {"command": "echo hello-from-tool"},
    "shell": {"command": ["echo", "hello-from-tool"]},
    "Bash": {"command": "echo hello-from-tool", "description": "say hello"},
}
THOUGHT, TEXT = "The user wants the weather.", "It is sunny: 21 degrees."
OBJECT = '{"city": "Paris", "degrees": 21}'
CONTEXT = 131072
TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}# Tools

You may call one or more functions. Their signatures are within <tools></tools> XML tags:
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>

For each function call, return a json object with its name and arguments within <tool_call></tool_call> tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- set is_later = message.role == 'system' and not loop.first %}
{%- if message.role == 'user' or is_later %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' %}<|im_start|>assistant
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% elif message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def answer_to(prompt: str, *, is_constrained: bool) -> str:
    """Returns the answer to a rendered conversation."""
    name = next((n for n in CALLS if f'"name": "{n}"' in prompt), None)
    last = prompt.rpartition("<|im_start|>user")[2]
    if name is not None and not last.strip().startswith("<tool_response>"):
        call = json.dumps({"name": name, "arguments": CALLS[name]})
        return f"<tool_call>\n{call}\n</tool_call>"
    return OBJECT if is_constrained and name is None else TEXT


class ScriptedEngine:
    """An ``EngineProtocol`` without a model. Each answer is written by a thread."""

    def __init__(self, codec: TextCodec, end_id: int, *, thinks: bool):
        self.facts = ModelFacts(codec, CONTEXT, codec.vocab_size, frozenset({end_id}))
        self.codec, self.end_id, self.thinks = codec, end_id, thinks
        self.threads = ThreadPoolExecutor(8)
        self.running: dict[str, Request] = {}
        self.listeners: list[Listener] = []

    def submit(self, requests: list[Request]) -> None:
        for request in requests:
            self.running[request.id] = request
            self.threads.submit(self._write, request)

    def abort(self, request_ids: Iterable[str]) -> None:
        for id in request_ids:
            self.running.pop(id, None)

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(len(self.running), 0, 0.0, True, 0)

    def moe_stats(self) -> dict[str, Any]:
        phase = {"steps": 0, "per_layer": [], "counts": []}
        shape = {"layers": 0, "moe_layers": [], "experts": 0, "top_k": 0}
        return {"model": shape, "mesh": {}, "prefill": phase, "decode": phase}

    def add_listener(self, listener: Listener) -> None:
        self.listeners.append(listener)

    def _write(self, request: Request) -> None:
        prompt = self.codec.decode(request.prompt_token_ids, skip_special=False)
        text = answer_to(prompt, is_constrained=request.constraint is not None)
        thoughts = f"<think>\n{THOUGHT}\n</think>\n\n"
        first, allowed = self.codec.encode(thoughts, special=False)[0], allowed_ids(request)
        if self.thinks and (allowed is None or first in allowed):  # a grammar may begin at once
            text = thoughts + text
        texts = Detokenizer(self.codec, request.params.stop, None, request.markup)
        most = request.params.max_tokens or CONTEXT
        request.start_time = time.monotonic()
        for token in [*self.codec.encode(text, special=False), self.end_id]:
            output = self._output(request, texts, accepted(request, token), most)
            if request.id not in self.running:
                return
            if output.finish_reason is not None:
                del self.running[request.id]
            request.emit(output)
            if output.finish_reason is not None:
                return

    def _output(self, request: Request, texts: Detokenizer, token: int, most: int) -> Output:
        request.token_ids.append(token)
        request.first_token_time = request.first_token_time or time.monotonic()
        finish = None
        if token == self.end_id:
            text, finish = texts.push_end(token), "stop"
        else:
            text = texts.push(token)
        thoughts, is_thought = texts.thoughts, texts.is_thought
        if finish is None and texts.stop_match:
            finish = "stop"
        elif finish is None and len(request.token_ids) >= most:
            finish = "length"
        if finish is not None and not texts.stop_match:
            text, thoughts = text + texts.flush(), thoughts + texts.thoughts
        return Output(
            request.id,
            (token,),
            text,
            thoughts,
            finish_reason=finish,
            stop_reason=texts.stop_match,
            num_thought_tokens=int(is_thought),
        )


def allowed_ids(request: Request) -> np.ndarray | None:
    """Returns the ids of the tokens that a grammar allows next; None = there is no grammar."""
    if request.constraint is None:
        return None
    words = request.constraint.allowed()
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))


def accepted(request: Request, token: int) -> int:
    """Returns the token, or the first allowed one if a grammar forbids it, which then goes on after it."""
    allowed = allowed_ids(request)
    if request.constraint is None or allowed is None:
        return token
    token = token if token in allowed else int(allowed[0])
    request.constraint.accept(token)
    return token


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--thinks", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for file in model_directory("tiny").glob("tokenizer*.json"):
            shutil.copy(file, directory)
        config = json.loads((directory / "tokenizer_config.json").read_text())
        text = json.dumps(config | {"chat_template": TEMPLATE})
        (directory / "tokenizer_config.json").write_text(text)
        shutil.copy(model_directory("tiny") / "config.json", directory)
        codec = load_codec(directory, json.loads((directory / "config.json").read_text())["vocab_size"])
        assert codec is not None
        [end_id] = codec.encode(config["eos_token"], special=False)
        engine = ScriptedEngine(codec, end_id, thinks=args.thinks)
        settings = ServerSettings(served_model_name=("fake", "fake-small"), port=args.port)
        return serve(engine, settings, directory=directory)


if __name__ == "__main__":
    raise SystemExit(main())
