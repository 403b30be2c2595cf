"""The format of text completions."""

from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from jmoe.engine.request import Output, TokenLogprob
from jmoe.engine.text.answer_text import AnswerText
from jmoe.server.answer.formats import (
    ChoiceFields,
    Outputs,
    answer_ids,
    answer_text,
    answer_thoughts,
    finish_reason,
    prompt_scores,
    stop_reason,
)
from jmoe.server.answer.logprobs import completion_logprobs, with_alternatives
from jmoe.server.answer.replies import Completion, CompletionChoice, CompletionLogprobs, Head, Usage
from jmoe.server.request.prompts import Prompt


class Offsets:
    """Counts the characters of one choice's text, to find where in them each token begins."""

    def __init__(self, prompt: Prompt, fields: ChoiceFields, *, echo: bool):
        self.prompt, self.codec = prompt, fields.codec
        self.position, self.text = len(prompt.text) if echo else 0, None
        if fields.codec is not None:
            bytes_of, shown = fields.codec.token_bytes, fields.shows_special
            self.text = AnswerText(bytes_of, prompt.token_ids, shows_special=shown)

    def prompt_offsets(self) -> list[int]:
        return [0] * len(self.prompt.token_ids) if self.codec is None else self.prompt.offsets(self.codec)

    def next_offset(self, token_id: int) -> int:
        """Returns the offset of the answer's next token; for a part of a character, where the character
        begins."""
        offset = self.position
        self.position += 0 if self.text is None else len(self.text.push(token_id).text)
        return offset


class CompletionFormat:
    """A ``ChunkFormat``. Choices are prompt-major: choice i continues prompt i // ``fields.n``.

    An echoed prompt precedes the first increment's text; its log-probabilities precede the first token's.
    """

    def __init__(self, fields: ChoiceFields, prompts: list[Prompt], *, echo: bool):
        self.fields, self.prompts, self.echo = fields, prompts, echo
        self.offsets: list[Offsets | None] = [None] * (len(prompts) * fields.n)

    def opening(self, head: Head) -> Sequence[Completion]:
        return ()

    def chunk(self, head: Head, index: int, output: Output) -> Completion:
        return _completion(head, [self._choice(index, (output,))])

    def closing(self, head: Head) -> Completion:
        return _completion(head, [])

    def whole(self, head: Head, choices: Sequence[Outputs], usage: Usage) -> Completion:
        return _completion(head, [self._choice(i, outputs) for i, outputs in enumerate(choices)], usage)

    def _choice(self, index: int, outputs: Outputs) -> CompletionChoice:
        """Returns the next increments of a choice, or all of them."""
        echoes, offsets = self.echo and self.offsets[index] is None, self._offsets(index)
        return CompletionChoice(
            index=index,
            text=offsets.prompt.text + answer_text(outputs) if echoes else answer_text(outputs),
            logprobs=None if self.fields.alternatives is None else self._logprobs(offsets, outputs, echoes),
            prompt_logprobs=prompt_scores(self.fields, outputs),
            reasoning_content=answer_thoughts(outputs),
            finish_reason=finish_reason(outputs),
            stop_reason=stop_reason(outputs),
            token_ids=answer_ids(outputs) if self.fields.has_token_ids else UNSET,
        )

    def _offsets(self, index: int) -> Offsets:
        if (offsets := self.offsets[index]) is None:
            prompt = self.prompts[index // self.fields.n]
            offsets = self.offsets[index] = Offsets(prompt, self.fields, echo=self.echo)
        return offsets

    def _logprobs(self, offsets: Offsets, outputs: Outputs, with_prompt: bool) -> CompletionLogprobs:
        entries: list[tuple[int, TokenLogprob | None]] = [
            (entry.token_id, entry) for output in outputs for entry in output.logprobs
        ]
        positions = [offsets.next_offset(token_id) for token_id, _ in entries]
        if with_prompt:
            most = self.fields.alternatives or 0
            scores = [with_alternatives(each, most) for each in outputs[0].prompt_logprobs or ()]
            prompt = [*zip(offsets.prompt.token_ids, scores, strict=False)]
            entries = [*prompt, *entries]
            positions = [*offsets.prompt_offsets()[: len(prompt)], *positions]
        return completion_logprobs(entries, self.fields.codec, positions)


def _completion(head: Head, choices: list[CompletionChoice], usage: Usage | UnsetType = UNSET) -> Completion:
    return Completion(
        id=head.id,
        created=head.created,
        model=head.model,
        system_fingerprint=head.system_fingerprint,
        object="text_completion",
        choices=choices,
        usage=usage,
    )
