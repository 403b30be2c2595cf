"""A Jinja environment whose templates end: their time, and the size of every value they make, are bounded.

Every loop iteration and every call checks the clock. The work between two checks (an operator, a filter, a
method) is one pass over existing values: the size of a result that could be much larger is checked first, and
before a value is turned into text or compared, its parts are counted, shared parts each time. Nothing is
computed when a template is compiled.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jmoe.server.template.bounds import Bounds, check_number, check_size, flat, length, small

# Filters that read only a value's first level, or make a generator.
SHALLOW = frozenset({
    "length", "count", "first", "last", "default", "d", "items", "attr", "map", "select", "reject",
    "selectattr", "rejectattr", "list", "reverse", "random", "in_time", "measured",
})  # fmt: skip
COMPARES = ("eq", "equalto", "==", "ne", "!=", "lt", "lessthan", "<", "le", "<=", "gt", "greaterthan", ">",
            "ge", ">=", "in")  # fmt: skip
BUILTIN = (str, bytes, int, float, list, tuple, dict)


class GenerationTag(jinja2.ext.Extension):
    """The tag ``{% generation %}``. It marks what an assistant wrote, for training: it is rendered as if
    unmarked."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """An environment that bounds its renderings with ``bounds``, whose clock the caller starts."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        self.bounds = bounds = Bounds()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=self._written,  # it takes the context, so no output is computed at compile time
            extensions=["jinja2.ext.loopcontrols", GenerationTag],
        )
        del self.globals["lipsum"]  # filler text, of any length
        self.filters |= {"in_time": bounds.in_time, "measured": bounds.measured, "sum": self._sum}
        self.filters |= {n: self.bounded(n, f) for n, f in self.filters.items() if n not in SHALLOW}
        self.tests |= {n: self.bounded(n, self.tests[n]) for n in COMPARES}

    def template(self, source: str) -> jinja2.Template:
        """Compiles ``source`` with every loop and every pass over a value bounded."""
        tree = self.parse(source)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = _filtered(loop.iter, "in_time")
        for compared in tree.find_all(jinja2.nodes.Compare):
            compared.expr = _filtered(compared.expr, "measured")
            for operand in compared.ops:
                operand.expr = _filtered(operand.expr, "measured")
        for joined in list(tree.find_all(jinja2.nodes.Concat)):
            joined.nodes = [_filtered(jinja2.nodes.List(joined.nodes, lineno=joined.lineno), "join")]
        for written in tree.find_all(jinja2.nodes.Output):
            written.nodes = [_as_value(node) for node in written.nodes]
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    @jinja2.pass_context
    def _written(self, context: Any, value: Any) -> str:
        return self.bounds.write(value)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.bounds.check_clock()
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        if isinstance(method, BuiltinMethodType) and isinstance(method.__self__, BUILTIN):
            args = tuple(self.bounds.listed(value) for value in args)
            self.bounds.check_call(method.__name__, method.__self__, args, kwargs)
        return small(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.bounds.check_clock()
        if operator == "+":
            check_size(length(left) + length(right))
        elif operator == "%" and isinstance(left, str | bytes):
            self.bounds.check_format("%", left, flat(right))
        else:
            check_number(operator, left, right)
        return small(super().call_binop(context, operator, left, right))

    def bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a filter or test so that its arguments and result are measured."""
        skipped, bounds = 1 if hasattr(function, "jinja_pass_arg") else 0, self.bounds

        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            bounds.check_clock()
            arguments = [bounds.listed(value) for value in args[skipped:]]
            for value in (*arguments, *kwargs.values()):
                bounds.measured(value)
            bounds.check_call(name, arguments[0] if arguments else None, arguments[1:], kwargs)
            return small(function(*args[:skipped], *arguments, **kwargs))

        return bounded

    def _sum(self, values: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
        """Replaces Jinja's ``sum``, which adds lists in one call, in quadratic time."""
        for value in self.bounds.in_time(values):
            for part in [] if attribute is None else str(attribute).split("."):
                value = self.getitem(value, int(part) if part.isdigit() else part)
            start = self.call_binop(None, "+", start, value)
        return start


def _filtered(node: Any, name: str) -> jinja2.nodes.Expr:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _as_value(node: jinja2.nodes.Expr) -> jinja2.nodes.Expr:
    plain = isinstance(node, jinja2.nodes.TemplateData)
    return jinja2.nodes.Const(node.data, lineno=node.lineno) if plain else node
