"""The format of chat answers that may call functions, in any dialect."""

from collections.abc import Iterator, Sequence

from msgspec import UNSET, UnsetType

from jmoe.engine.request import Output
from jmoe.server.answer.chats import ChatFormat
from jmoe.server.answer.formats import ChoiceFields, Outputs, answer_text, answer_thoughts
from jmoe.server.answer.replies import (
    AnswerMessage,
    Call,
    CallPiece,
    ChatChoice,
    ChatCompletionChunk,
    ChatPiece,
    Delta,
    FinishReason,
    FunctionCall,
    FunctionPiece,
    Head,
)
from jmoe.server.dialects.events import Arguments, CallEnd, CallStart, Event, PlainText
from jmoe.server.request.tools import ToolUse


def call_id(tools: ToolUse, start: CallStart, number: int) -> str:
    """Returns the id of a call: the model's own, or a new one in the form that its template takes.

    number: number of calls in the answer before it.
    """
    return start.id or tools.new_id(start.name, number)


class CallsAnswer:
    """One choice's answer, as its dialect's reader finds it.

    num_calls: number of calls that began so far.
    has_called: whether there is a call and the arguments of the last one are whole.
    """

    def __init__(self, tools: ToolUse):
        self.tools, self.reader = tools, tools.reader()
        self.num_calls, self.has_called = 0, False

    def delta(self, output: Output) -> Delta:
        """Returns what an increment adds. Pieces of one call that come together are one piece."""
        text, calls = "", list[CallPiece]()
        for event in self._events(output.text, is_last=output.finish_reason is not None):
            match event:
                case PlainText():
                    text += event.text
                case CallStart():
                    piece = self._piece(event.name)
                    piece.id, piece.type = call_id(self.tools, event, self.num_calls - 1), "function"
                    calls.append(piece)
                case Arguments():
                    if not calls:
                        calls.append(self._piece())
                    calls[-1].function.arguments += event.text
        return Delta(
            content=text or UNSET,
            reasoning_content=output.thoughts or UNSET,
            tool_calls=calls or UNSET,
        )

    def message(self, outputs: Outputs) -> AnswerMessage:
        """Returns the whole answer. Its content is null if it has no text."""
        text, calls = "", list[Call]()
        for event in self._events(answer_text(outputs), is_last=True):
            match event:
                case PlainText():
                    text += event.text
                case CallStart():
                    id = call_id(self.tools, event, self.num_calls - 1)
                    calls.append(Call(id, "function", FunctionCall(event.name, "")))
                case Arguments():
                    calls[-1].function.arguments += event.text
        return AnswerMessage(
            role="assistant",
            content=text or None,
            refusal=None,
            reasoning_content=answer_thoughts(outputs),
            tool_calls=calls or UNSET,
        )

    def _piece(self, name: str | UnsetType = UNSET) -> CallPiece:
        return CallPiece(index=self.num_calls - 1, function=FunctionPiece(name=name, arguments=""))

    def _events(self, text: str, *, is_last: bool) -> Iterator[Event]:
        events = self.reader.feed(text)
        for event in [*events, *self.reader.close()] if is_last else events:
            if isinstance(event, CallStart):
                self.num_calls, self.has_called = self.num_calls + 1, False
            elif isinstance(event, CallEnd):
                self.has_called = True
            yield event


class ToolFormat(ChatFormat):
    """The format of chats whose answers use tools.

    An answer whose function the request named ends with the reason "stop"; an answer whose function the model
    chose ends with "tool_calls", as OpenAI's do.
    """

    def __init__(self, fields: ChoiceFields, tools: ToolUse):
        super().__init__(fields)
        self.is_named = tools.choice == "named"
        self.answers = [CallsAnswer(tools) for _ in range(fields.n)]

    def opening(self, head: Head) -> Sequence[ChatCompletionChunk]:
        return self._opening(head, None)

    def piece(self, index: int, output: Output) -> ChatPiece:
        piece = super().piece(index, output)
        piece.delta = self.answers[index].delta(output)
        piece.finish_reason = self._reason(index, piece.finish_reason)
        return piece

    def choice(self, index: int, outputs: Outputs) -> ChatChoice:
        choice = super().choice(index, outputs)
        choice.message = self.answers[index].message(outputs)
        choice.finish_reason = self._reason(index, choice.finish_reason)
        return choice

    def _reason(self, index: int, reason: FinishReason | None) -> FinishReason | None:
        called = self.answers[index].has_called and not self.is_named
        return "tool_calls" if reason == "stop" and called else reason
