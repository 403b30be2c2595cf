"""Tests the chat template's sandbox: what every loop form renders, and that no template runs for ever."""

import os
import subprocess
import sys
import time

import jinja2.sandbox
import pytest

from jmoe.server.template.chat_template import ChatTemplate, load_chat_template, load_turn_ends

MESSAGES = [{"role": r, "content": c} for r, c in (("system", "be brief"), ("user", "hi"), ("user", "you?"))]
LOOPS = {
    "loop variables": "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.first }}"
    "{{ loop.last }}{{ loop.previtem.role if loop.previtem is defined }}"
    "{{ loop.nextitem.role if not loop.last }};{% endfor %}",
    "condition": "{% for m in messages if m.role == 'user' %}{{ loop.length }}{{ m.content }}{% endfor %}",
    "else": "{% for m in messages if m.role == 'tool' %}x{% else %}none{% endfor %}",
    "break": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "dictionary": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
    "undefined": "{% for x in tools %}{{ x }}{% endfor %}.",
    "constant": "{% for x in [1, 2, 3] %}{{ x }}{% for y in 'ab' %}{{ y }}{% endfor %}{% endfor %}",
    "recursive": "{% for x in [[1, []], [2, [[3, []]]]] recursive %}{{ x[0] }}({{ loop(x[1]) }}){% endfor %}",
    "macro": "{% macro say(m) %}{{ m.role }}: {{ caller() }}{% endmacro %}"
    "{% for m in messages %}{% call say(m) %}{{ m.content }}{% endcall %}{% endfor %}",
    "cycle": "{% for m in messages %}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{% endfor %}",
}


@pytest.mark.parametrize("source", LOOPS.values(), ids=LOOPS)
def test_loops_render_as_in_a_plain_sandbox(source: str):
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    want = plain.from_string(source).render(messages=MESSAGES, add_generation_prompt=True)
    assert ChatTemplate(source, {}).render(MESSAGES) == want != ""


ENDLESS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops in a set block": "{% set x %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}{% endset %}{{ x }}",
    "macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in range(2) recursive %}{{ loop(range(2)) if loop.depth < 60 }}{% endfor %}",
    "every pair of many messages": "{% for m in messages * 9999 %}{% for n in messages * 9999 %}{% endfor %}"
    "{% endfor %}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_goes_on_is_ended(source: str):
    template = ChatTemplate(source, {}, seconds=0.1)
    for _ in range(2):  # the second rendering has its own clock
        start = time.thread_time()
        with pytest.raises(ValueError, match=r"cannot render these messages: it takes longer than 0\.1 s"):
            template.render(MESSAGES)
        assert 0.09 < time.thread_time() - start < 2


def test_a_long_conversation_is_in_time():
    source = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    start = time.thread_time()
    assert len(ChatTemplate(source, {}).render(MESSAGES * 10_000)) > 300_000
    assert time.thread_time() - start < 2.5, "half the limit"


@pytest.mark.parametrize(("name", "text"), [
    ("tokenizer_config.json", "[]"),
    ("tokenizer_config.json", '{"chat_template": 5}'),
    ("tokenizer_config.json", '{"chat_template": [{"name": "default", "template": 5}]}'),
    ("tokenizer_config.json", "[" * 100_000),
    ("chat_template.jinja", "{% for %}"),
    ("generation_config.json", "[]"),
    ("generation_config.json", '{"stop_strings": 5}'),
    ("generation_config.json", '{"stop_strings": [""]}'),
])  # fmt: skip
def test_a_template_file_that_is_none_is_refused_by_name(tmp_path, name: str, text: str):
    (tmp_path / name).write_text(text)
    read = load_turn_ends if name.startswith("generation") else load_chat_template
    with pytest.raises(ValueError, match=str(tmp_path)):
        read(tmp_path)


MEMORY = {
    "a long list": "{{ [0] * 10 ** 10 }}",
    "doubled over and over": "{% set ns = namespace(x='x') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "padded": "{{ 'x' | center(10 ** 11) }}",
}
IN_LITTLE_MEMORY = """
import resource, sys
from jmoe.server.template.chat_template import ChatTemplate
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
for source in sys.argv[1:]:
    try:
        ChatTemplate(source, {}).render([])
    except ValueError as error:
        print(error)
"""


def test_where_memory_ends_a_template_is_refused_and_the_process_goes_on():
    """If memory ends, a template is refused and the process continues.

    A template comes from the model's folder, never with a request. Its process may have a limit of memory.
    """
    ended = subprocess.run(
        [sys.executable, "-c", IN_LITTLE_MEMORY, *MEMORY.values()],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["the chat template cannot render these messages"] * len(MEMORY)
