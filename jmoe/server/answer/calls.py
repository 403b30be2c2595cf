"""The format of chat answers that are calls of functions, and the reader of a call's text."""

import secrets
import string
from collections.abc import Sequence
from typing import TypeVar

from msgspec import UNSET

from jmoe.engine.request import Output
from jmoe.server.answer.chats import ChatFormat
from jmoe.server.answer.formats import ChoiceFields, Outputs
from jmoe.server.answer.replies import (
    AnswerMessage,
    Call,
    CallPiece,
    ChatChoice,
    ChatCompletionChunk,
    ChatPiece,
    Delta,
    FunctionCall,
    FunctionPiece,
    Head,
)
from jmoe.server.request.tools import ToolUse, call_opening

ALPHABET = string.ascii_letters + string.digits
Choice = TypeVar("Choice", ChatChoice, ChatPiece)


def call_id() -> str:
    """Nine letters and digits: some models' templates demand exactly this of the ids in a conversation."""
    return "".join(secrets.choice(ALPHABET) for _ in range(9))


class CallReader:
    """Reads one call from the pieces of an answer, as ``tools_grammar`` spells it.

    name: name of the called function; None until it is known.
    is_complete: whether the arguments' last brace was read.
    """

    def __init__(self, tools: ToolUse):
        self.openings = {call_opening(function.name): function.name for function in tools.functions}
        self.name = tools.functions[0].name if tools.is_named else None
        self.text = ""  # of the answer, until the name is known
        self.depth, self.in_string, self.is_escaped, self.is_complete = 0, False, False, False

    def feed(self, text: str) -> str:
        """Takes the answer's next text and returns the part of it that belongs to the arguments."""
        if self.name is None:
            self.text += text
            opening = next((o for o in self.openings if self.text.startswith(o)), None)
            if opening is None:
                return ""
            self.name, text = self.openings[opening], self.text[len(opening) :]
        return "".join(c for c in text if self._inside(c))

    def _inside(self, c: str) -> bool:
        """Whether ``c`` belongs to the arguments; what follows their last brace closes the call."""
        inside = not self.is_complete
        if self.in_string:
            self.in_string = self.is_escaped or c != '"'
            self.is_escaped = c == "\\" and not self.is_escaped
        elif c == '"':
            self.in_string = True
        elif c in "{[":
            self.depth += 1
        elif c in "]}":
            self.depth -= 1
            self.is_complete = self.is_complete or self.depth <= 0
        return inside


class ToolFormat(ChatFormat):
    """The format of chats in which each choice is one call of one of ``tools``.

    An answer whose function the request named ends with the reason "stop"; an answer whose function the model
    chose ends with "tool_calls", as OpenAI's do.
    """

    def __init__(self, fields: ChoiceFields, tools: ToolUse):
        super().__init__(fields)
        self.is_named = tools.is_named
        self.readers = [CallReader(tools) for _ in range(fields.n)]
        self.has_begun = [False] * fields.n  # whether the first piece of the call was made
        self.ids = [call_id() for _ in range(fields.n)]

    def opening(self, head: Head) -> Sequence[ChatCompletionChunk]:
        return self._opening(head, None)

    def piece(self, index: int, output: Output) -> ChatPiece:
        piece = super().piece(index, output)
        call = self._call_piece(index, output.text)
        piece.delta = Delta(tool_calls=UNSET if call is None else [call])
        return self._with_reason(index, piece)

    def _call_piece(self, index: int, text: str) -> CallPiece | None:
        reader = self.readers[index]
        arguments = reader.feed(text)
        if reader.name is not None and not self.has_begun[index]:
            self.has_begun[index] = True
            function = FunctionPiece(name=reader.name, arguments=arguments)
            return CallPiece(index=0, id=self.ids[index], type="function", function=function)
        return CallPiece(index=0, function=FunctionPiece(arguments=arguments)) if arguments else None

    def choice(self, index: int, outputs: Outputs) -> ChatChoice:
        """An answer cut before its function's name was whole has no call."""
        reader = self.readers[index]
        arguments = "".join(reader.feed(output.text) for output in outputs)
        message = AnswerMessage(role="assistant", content=None, refusal=None)
        if reader.name is not None:
            message.tool_calls = [Call(self.ids[index], "function", FunctionCall(reader.name, arguments))]
        choice = super().choice(index, outputs)
        choice.message = message
        return self._with_reason(index, choice)

    def _with_reason(self, index: int, choice: Choice) -> Choice:
        if choice.finish_reason == "stop" and not self.is_named and self.readers[index].is_complete:
            choice.finish_reason = "tool_calls"
        return choice
