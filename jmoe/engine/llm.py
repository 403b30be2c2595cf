"""``LLM``: the engine for Python callers, one batch of prompts at a time."""

import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from jmoe.config.moe import MoEConfig
from jmoe.config.reading import check_keys, hints, shown, typed
from jmoe.engine.build import build_engine
from jmoe.engine.deployment.found import find_model
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.grammar.grammar import Grammar, GrammarCompiler
from jmoe.engine.request import FinishReason, MoEUsage, Output, Request, SamplingParams, TokenLogprob
from jmoe.engine.step.windows import window_length
from jmoe.mesh import EXPERT

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Completion:
    """One continuation.

    text: generated text.
    token_ids: generated tokens.
    finish_reason: reason why it ended.
    logprobs: one entry a generated token, if requested.
    thoughts: see ``Output``.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    logprobs: list[TokenLogprob]
    thoughts: str = ""


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its continuation.

    prompt_token_ids: tokens of the prompt.
    outputs: completions of the prompt (one).
    prompt_logprobs: one entry per prompt token, None for the first, if requested.
    moe: what lossy techniques did, if any is configured.
    """

    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    moe: MoEUsage | None = None


class LLM:
    """A loaded, compiled model.

        llm = LLM("tiny")
        llm.generate(["Once upon a time"], SamplingParams(max_tokens=32, temperature=0.0))[0].outputs[0].text

    model: "tiny" (bundled), a Hugging Face directory, one written by ``jmoe convert``, a GGUF file, or
        ORG/NAME of the Hugging Face Hub, which is fetched unless it is in the cache.
    revision: branch, tag or commit of a model of the Hub; None = the main branch.
    download_dir: cache of models of the Hub; None = huggingface_hub's own.
    moe: configuration of the MoE layers; None = the default.
    warm_up: whether shapes compile now; if not, each shape compiles when it first runs.
    settings: other fields of ``EngineSettings``.

    ``close`` frees its memory; a ``with`` statement does so at its end. Raises ValueError naming what is
    wrong with the model or a setting.
    """

    def __init__(
        self,
        model: str | Path = "tiny",
        *,
        revision: str | None = None,
        download_dir: str | None = None,
        moe: MoEConfig | None = None,
        warm_up: bool = True,
        **settings: Any,
    ):
        check_keys("LLM", settings, hints(EngineSettings))
        self.settings = EngineSettings(moe=MoEConfig() if moe is None else moe, **settings)
        warm_up = typed("warm_up", warm_up, bool)
        found = find_model(model, revision, download_dir)
        self.engine = build_engine(found.path, self.settings, warm_up=warm_up)

    def close(self) -> None:
        """Frees the weights and the cache. Afterwards ``generate`` and ``logits`` raise EngineDead."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams = SamplingParams(),
        *,
        grammar: Grammar | None = None,
    ) -> list[RequestOutput]:
        """Continues every prompt (text or token ids), in order. Raises ValueError for a bad prompt, for a bad
        grammar, and for one that becomes too costly to follow.

        grammar: grammar that every answer follows; an answer that ``max_tokens`` cuts off is the beginning of
            a text that follows it.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list; got one string")
        compiled = None if grammar is None else self._grammars.compile(grammar)
        arrival_time = time.monotonic()
        collected: list[list[Output]] = [[] for _ in prompts]
        requests = [
            Request(
                id=str(i),
                prompt_token_ids=self.encode(prompt),
                params=params.with_seed(),
                emit=collected[i].append,
                arrival_time=arrival_time,
                constraint=None if compiled is None else compiled.constraint(),
            )
            for i, prompt in enumerate(prompts)
        ]
        self.engine.run(requests)
        return [self._result(r, parts) for r, parts in zip(requests, collected, strict=True)]

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        if self.engine.codec is None:
            raise ValueError("this model directory has no tokenizer.json, which grammars need")
        return GrammarCompiler(self.engine.codec.tokenizer, self.engine.vocab_size, self.engine.end_ids)

    def encode(self, prompt: Prompt) -> list[int]:
        """Returns the token ids of a prompt; raises ValueError if it is text and the model has no
        tokenizer."""
        if not isinstance(prompt, str):
            try:
                return [operator.index(t) for t in prompt]
            except TypeError:
                raise ValueError(f"a prompt is text or a list of token ids, got {shown(prompt)}") from None
        if self.engine.codec is None:
            raise ValueError("this model directory has no tokenizer.json; prompts must be token ids")
        return self.engine.codec.encode(prompt, limit=self.engine.max_model_len)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Returns ``[sequence, vocab]`` float32 logits of one window of tokens, for parity checks.

        They are those of the model as it is: no lossy technique is applied. The method compiles once for
        every power of two of the length.
        """
        self.engine.check_open()
        tokens = list(token_ids)
        if not 1 <= len(tokens) <= self.engine.max_model_len:
            raise ValueError(f"logits takes 1 to {self.engine.max_model_len} tokens, got {len(tokens)}")
        runner = self.engine.runner
        length = window_length(len(tokens), runner.mesh.shape[EXPERT])
        ids = np.zeros((runner.ranks, length), np.int32)
        positions = np.full((runner.ranks, length), -1, np.int32)
        ids[0, : len(tokens)], positions[0, : len(tokens)] = tokens, np.arange(len(tokens))
        return runner.window_logits(ids, positions)[0, : len(tokens)]

    @staticmethod
    def _result(request: Request, outputs: list[Output]) -> RequestOutput:
        if outputs[-1].error is not None:
            raise (ValueError if outputs[-1].is_invalid else RuntimeError)(outputs[-1].error)
        completion = Completion(
            text="".join(p.text for p in outputs),
            token_ids=list(request.token_ids),
            finish_reason=outputs[-1].finish_reason,
            logprobs=[entry for p in outputs for entry in p.logprobs],
            thoughts="".join(p.thoughts for p in outputs),
        )
        scored = next((p.prompt_logprobs for p in outputs if p.prompt_logprobs is not None), None)
        scores = None if scored is None else list(scored)
        return RequestOutput(request.prompt_token_ids, [completion], scores, outputs[-1].moe)
