"""No template runs for ever or makes a value of unlimited size; each attempt soon raises ValueError."""

import resource

import pytest
from support.least_time import within

from jmoe.server.template.chat_template import ChatTemplate

BIG = "{% set big = 'y' * 8000000 %}"
GROWS = "{% set ns = namespace(x='x', y='x') %}{% for i in range(99) %}GROW{% endfor %}"
NESTED = GROWS.replace("GROW", "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = {'a': ns.y, 'b': ns.y} %}")
SIZES = {
    "filler text": "{{ lipsum(n=10 ** 9) }}",
    "a constant folded when compiled": "{{ 'x' | replace('', 'y' * 10 ** 9) }}",
    "a block's option folded": "{% autoescape 'x' | replace('', 'y' * 10 ** 9) %}{% endautoescape %}",
    "repeated": "{{ 'x' * 10 ** 10 }}",
    "a list repeated": "{{ [0] * 10 ** 10 }}",
    "a power": "{% set n = 999999 %}{{ n ** n ** n }}",
    "a product": GROWS.replace("GROW", "{% set ns.x = (ns.x if i else 3) * (ns.x if i else 3) %}"),
    "added": GROWS.replace("GROW", "{% set ns.x = ns.x + ns.x %}"),
    "joined by a tilde": GROWS.replace("GROW", "{% set ns.x = ns.x ~ ns.x %}"),
    "a block of itself twice": GROWS.replace(
        "GROW", "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}"),
    "a block that repeats": BIG + "{% set x %}{% for i in range(9999) %}{{ big }}{% endfor %}{% endset %}",
    "shared parts written": NESTED + "{{ ns.x }}",
    "shared parts as text": NESTED + "{{ ns.y | string | length }}",
    "shared parts as JSON": NESTED + "{{ ns.y | tojson }}",
    "shared parts compared": NESTED + "{{ ns.x == ns.y }}",
    "shared parts tested": NESTED + "{{ ns.x is eq(ns.y) }}",
    "padded": "{{ 'x' | center(10 ** 11) }}",
    "padded by a method": "{{ 'x'.ljust(10 ** 10) }}",
    "tabs": "{{ ('\t' * 8000000).expandtabs(8000000) }}",
    "a width": "{{ '%99999999999d' % 1 }}",
    "a width of format": "{{ '{:>99999999999}'.format(1) }}",
    "a width given": "{{ '{:{}}'.format(1, 10 ** 10) }}",
    "a width given to the filter": "{{ '%*d' | format(10 ** 10, 1) }}",
    "a long text formatted often": BIG + "{{ ('{0}' * 1000000).format(big) }}",
    "joined": BIG + "{{ range(99999) | join(big) }}",
    "joined by a method": BIG + "{{ big.join(['a'] * 99999) }}",
    "one text joined often": BIG + "{{ ([big] * 99999) | join }}",
    "replaced": BIG + "{{ ('a' * 8000000) | replace('a', big) }}",
    "replaced by name": BIG + "{{ ('a' * 8000000) | replace(new=big, old='a') }}",
    "replaced by a method": BIG + "{{ ('a' * 8000000).replace('a', big) }}",
    "translated": BIG + "{{ ('a' * 8000000).translate({97: big}) }}",
    "indented": "{{ ('\n' * 8000000) | indent(8000000) }}",
    "indented JSON": "{{ range(999) | list | tojson(indent=10 ** 9) }}",
    "wrapped": BIG + "{{ ('a' * 8000000) | wordwrap(1, wrapstring=big) }}",
    "slices": "{{ range(9) | slice(10 ** 9) | list }}",
    "a batch filled": "{{ range(9) | batch(10 ** 10, 'x') | list }}",
    "bytes of a number": "{{ (5).to_bytes(10 ** 10, 'big') }}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "blocks in blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
}  # fmt: skip


@pytest.mark.parametrize("source", SIZES.values(), ids=SIZES)
def test_no_value_of_any_size_is_made(source: str):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def refuse() -> None:
        with pytest.raises(ValueError, match=r"the chat template (cannot render|refuses|does not compile)"):
            ChatTemplate(source, {}, seconds=0.5).render([])

    within(2, refuse)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024, "KiB"


ORDINARY = {
    "JSON": ("{{ messages[0] | tojson(indent=2) }}", '{\n  "role": "user",\n  "content": "<é>"\n}'),
    "JSON's order": ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<é>"}'),
    "sums": ("{{ [1, 2] | sum }}{{ [{'a': 3}] | sum(attribute='a') }}", "33"),
    "texts": ("{{ 'a' ~ 1 ~ none }}{{ 'a%s' % 'b' }}{{ '{}-{:>3}'.format(1, 2) }}{{ 'ab' * 2 }}",
              "a1Noneab1-  2abab"),
    "filters": ("{{ messages | map(attribute='role') | join(', ') | upper | replace('E', 'e') }}", "USeR"),
    "lists": ("{{ ([1] + [2, 3])[1:] | list | length }}{{ messages | selectattr('role', 'equalto', 'user') "
              "| list | length }}", "21"),
    "generation": ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
    "tools, documents": ("{{ tools is none }}{{ documents is defined and documents is none }}", "TrueTrue"),
    "no tools": ("{% for tool in tools %}x{% endfor %}.", "."),
    "dates": ("{{ strftime_now('%Y') | length }}", "4"),
}  # fmt: skip


@pytest.mark.parametrize(("source", "right"), ORDINARY.values(), ids=ORDINARY)
def test_what_templates_do_is_as_without_bounds(source: str, right: str):
    assert ChatTemplate(source, {}).render([{"role": "user", "content": "<é>"}]) == right


def test_a_large_conversation_is_no_large_value():
    messages = [{"role": "user", "content": "word " * 100}] * 10_000
    source = "{% for m in messages %}{{ m.role + ': ' + m.content ~ '\n' }}{% endfor %}"
    assert len(ChatTemplate(source, {}).render(messages)) == 10_000 * 507
