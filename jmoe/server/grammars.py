"""Compiled grammars of the requests, made off the event loop, the last ones kept in memory."""

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from jmoe.engine.grammar import CompiledGrammar, Grammar, GrammarCompiler
from jmoe.engine.grammar_check import GrammarChecker
from jmoe.faults import contained
from jmoe.server.engine_api import EngineProtocol
from jmoe.server.errors import invalid, unavailable

MAX_KEPT = 64
MAX_KEPT_BYTES = 1024 * 1024  # of their texts
MAX_WAITING = 32


class Grammars:
    """One a server. The compiler is made at the first grammar. One is compiled at a time, on a thread of its
    own, so that costly ones delay nothing but one another."""

    def __init__(self, engine: EngineProtocol):
        self.engine = engine
        self.kept: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self.waiting = 0
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="jmoe-grammars")
        self._tools: tuple[GrammarCompiler, GrammarChecker] | None = None

    async def compile(self, grammar: Grammar, param: str) -> CompiledGrammar:
        """400 says why it cannot be compiled, 503 that too many wait. param: the field to blame."""
        kept = self.kept.get(grammar)
        if kept is not None:
            self.kept.move_to_end(grammar)
            return kept
        if self.waiting >= MAX_WAITING:
            raise unavailable(f"{MAX_WAITING} grammars wait to be compiled", "grammar_queue_full")
        self.waiting += 1
        try:
            compiled = await asyncio.get_running_loop().run_in_executor(
                self._executor, contained, self._compile, grammar
            )
        except ValueError as error:
            raise invalid(f"{param} cannot be used: {error}", param) from None
        finally:
            self.waiting -= 1
        self._keep(grammar, compiled)
        return compiled

    def close(self) -> None:
        self._executor.shutdown()
        if self._tools is not None:
            self._tools[1].close()

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        if self._tools is None:
            codec = self.engine.codec
            if codec is None:
                raise ValueError("this model has no tokenizer")
            compiler = GrammarCompiler(codec.tokenizer, self.engine.vocab_size, self.engine.end_ids)
            self._tools = compiler, GrammarChecker(compiler.spec)
        compiler, checker = self._tools
        checker.check(grammar.source())
        return compiler.compile(grammar)

    def _keep(self, grammar: Grammar, compiled: CompiledGrammar) -> None:
        self.kept[grammar] = compiled
        while len(self.kept) > MAX_KEPT or sum(len(g.text) for g in self.kept) > MAX_KEPT_BYTES:
            self.kept.popitem(last=False)
