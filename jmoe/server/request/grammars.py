"""Compiles the grammars of requests off the event loop and keeps the most recent ones in memory."""

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from jmoe.engine.faults import contained
from jmoe.engine.grammar.check import MAX_SECONDS, CheckerUnavailable, GrammarChecker, TooCostly
from jmoe.engine.grammar.grammar import CompiledGrammar, Grammar, GrammarCompiler, GrammarConstraint
from jmoe.engine.reports import ModelFacts
from jmoe.server.errors import invalid, unavailable
from jmoe.server.request.structured import GrammarRequest

MAX_KEPT = 64
MAX_KEPT_BYTES = 1024 * 1024  # characters of the kept grammars' texts
MAX_WAITING = 32
QUICK_SECONDS = 0.15  # processor time; a grammar that takes more waits for the other costly ones
QUICK_THREADS = 2


@dataclass(frozen=True)
class AnswerGrammar:
    """A compiled grammar that answers follow, and the request field that requests it."""

    compiled: CompiledGrammar
    param: str

    def constraint(self) -> GrammarConstraint:
        try:
            return self.compiled.constraint()
        except ValueError as error:
            raise invalid(f"{self.param} cannot be used: {error}", self.param) from None


class Grammars:
    """Compiled grammars; there is one such object per server. The compiler is made at the first grammar.

    A grammar is first tried on the quick threads. If it turns out to be costly, it is tried again on a thread
    for costly grammars only, one after another: they delay only one another.
    """

    def __init__(self, facts: ModelFacts):
        self.facts = facts
        self.cache: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self.num_waiting = 0
        self._quick = ThreadPoolExecutor(QUICK_THREADS, thread_name_prefix="jmoe-grammars")
        self._costly = ThreadPoolExecutor(1, thread_name_prefix="jmoe-costly-grammars")
        self._making = threading.Lock()
        self._pair: tuple[GrammarCompiler, GrammarChecker] | None = None

    async def compile(self, request: GrammarRequest) -> AnswerGrammar:
        """Compiles a grammar. A 400 says why it cannot be compiled; a 503 is raised if too many wait or the
        check cannot run."""
        grammar, param = request.grammar, request.param
        cached = self.cache.get(grammar)
        if cached is not None:
            self.cache.move_to_end(grammar)
            return AnswerGrammar(cached, param)
        if self.num_waiting >= MAX_WAITING:
            raise unavailable(f"{MAX_WAITING} grammars wait to be compiled", "grammar_queue_full")
        self.num_waiting += 1
        try:
            compiled = await self._compiled(request)
        except ValueError as error:
            raise invalid(f"{param} cannot be used: {error}", param) from None
        except CheckerUnavailable as error:
            raise unavailable(str(error), "grammars_unavailable") from None
        finally:
            self.num_waiting -= 1
        self._keep(grammar, compiled)
        return AnswerGrammar(compiled, param)

    def close(self) -> None:
        for executor in (self._quick, self._costly):
            executor.shutdown()
        if self._pair is not None:
            self._pair[1].close()

    async def _compiled(self, request: GrammarRequest) -> CompiledGrammar:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._quick, contained, self._compile, request, QUICK_SECONDS)
        except TooCostly:
            return await loop.run_in_executor(self._costly, contained, self._compile, request, MAX_SECONDS)

    def _compile(self, request: GrammarRequest, seconds: float) -> CompiledGrammar:
        """Tries a grammar and compiles it, or the one that mends it. Mending tries many: that is costly."""
        compiler, checker = self._compiler_and_checker()
        grammar = request.grammar
        try:
            checker.check(compiler.source(grammar), seconds)
        except TooCostly:
            raise
        except ValueError:
            if request.mend is None:
                raise
            if seconds < MAX_SECONDS:
                raise TooCostly("it must be mended") from None
            grammar = request.mend(lambda part: checker.check(compiler.source(part), QUICK_SECONDS))
        return compiler.compile(grammar)

    def _compiler_and_checker(self) -> tuple[GrammarCompiler, GrammarChecker]:
        with self._making:
            if self._pair is None:
                facts = self.facts
                if facts.codec is None:
                    raise ValueError("this model has no tokenizer")
                compiler = GrammarCompiler(facts.codec.tokenizer, facts.vocab_size, facts.end_ids)
                self._pair = compiler, GrammarChecker(compiler.spec)
            return self._pair

    def _keep(self, grammar: Grammar, compiled: CompiledGrammar) -> None:
        self.cache[grammar] = compiled
        while len(self.cache) > MAX_KEPT or sum(len(g.text) for g in self.cache) > MAX_KEPT_BYTES:
            self.cache.popitem(last=False)
