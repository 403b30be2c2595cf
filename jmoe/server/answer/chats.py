"""The format of chat completions."""

from collections.abc import Sequence

from msgspec import UNSET

from jmoe.engine.request import Output
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
from jmoe.server.answer.logprobs import chat_logprobs
from jmoe.server.answer.replies import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatPiece,
    Delta,
    Head,
    Usage,
)


class ChatFormat:
    """A ``ChunkFormat``."""

    def __init__(self, fields: ChoiceFields):
        self.fields = fields

    def opening(self, head: Head) -> Sequence[ChatCompletionChunk]:
        return self._opening(head, "")

    def _opening(self, head: Head, content: str | None) -> list[ChatCompletionChunk]:
        delta = Delta(role="assistant", content=content)
        pieces = [ChatPiece(index=i, delta=delta, finish_reason=None) for i in range(self.fields.n)]
        return [_chunk(head, [piece]) for piece in pieces]

    def chunk(self, head: Head, index: int, output: Output) -> ChatCompletionChunk:
        return _chunk(head, [self.piece(index, output)])

    def closing(self, head: Head) -> ChatCompletionChunk:
        return _chunk(head, [])

    def whole(self, head: Head, choices: Sequence[Outputs], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            id=head.id,
            created=head.created,
            model=head.model,
            system_fingerprint=head.system_fingerprint,
            object="chat.completion",
            choices=[self.choice(i, outputs) for i, outputs in enumerate(choices)],
            usage=usage,
            prompt_logprobs=prompt_scores(self.fields, choices[0]),
        )

    def piece(self, index: int, output: Output) -> ChatPiece:
        """Returns one increment of a choice."""
        outputs = (output,)
        return ChatPiece(
            index=index,
            delta=Delta(content=output.text, reasoning_content=output.thoughts or UNSET),
            logprobs=UNSET if self.fields.alternatives is None else self._logprobs(outputs),
            finish_reason=finish_reason(outputs),
            stop_reason=stop_reason(outputs),
            token_ids=answer_ids(outputs) if self.fields.has_token_ids else UNSET,
        )

    def choice(self, index: int, outputs: Outputs) -> ChatChoice:
        """Returns all increments of a choice."""
        return ChatChoice(
            index=index,
            message=AnswerMessage(
                role="assistant",
                content=answer_text(outputs),
                refusal=None,
                reasoning_content=answer_thoughts(outputs),
            ),
            logprobs=self._logprobs(outputs),
            finish_reason=finish_reason(outputs),
            stop_reason=stop_reason(outputs),
            token_ids=answer_ids(outputs) if self.fields.has_token_ids else UNSET,
        )

    def _logprobs(self, outputs: Outputs) -> ChatLogprobs | None:
        if self.fields.alternatives is None:
            return None
        entries = [entry for output in outputs for entry in output.logprobs]
        return chat_logprobs(entries, self.fields.codec, self.fields.alternatives)


def _chunk(head: Head, choices: list[ChatPiece]) -> ChatCompletionChunk:
    return ChatCompletionChunk(
        id=head.id,
        created=head.created,
        model=head.model,
        system_fingerprint=head.system_fingerprint,
        object="chat.completion.chunk",
        choices=choices,
    )
