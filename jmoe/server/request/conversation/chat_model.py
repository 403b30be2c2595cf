"""A model's own way of chatting: its template, its thoughts, and the form of its calls."""

from dataclasses import dataclass, field

from jmoe.engine.reports import ModelFacts
from jmoe.engine.text.codec import TextCodec
from jmoe.engine.text.markup import PLAIN, Markup
from jmoe.server.dialects.dialect import format_dialect
from jmoe.server.dialects.marks import apart_tokens
from jmoe.server.dialects.response_template import ResponseTemplate
from jmoe.server.dialects.template_dialect import TemplateDialect
from jmoe.server.request.conversation.literals import Literals
from jmoe.server.request.tools import ToolSupport, ToolUse
from jmoe.server.template.chat_template import ChatTemplate
from jmoe.server.template.probe import TOOL
from jmoe.server.template.thinking import Thinking
from jmoe.server.template.tool_format import tool_format

THOUGHT_MARKS = ("\ue003", "\ue004")  # stand in an answer's text for the tokens around thoughts


@dataclass(frozen=True)
class ChatModel:
    """The way in which a model chats.

    template: chat template; None = the model has none.
    codec: text codec; None = the model has no tokenizer.
    tools: how its answers call functions.
    """

    template: ChatTemplate | None
    codec: TextCodec | None
    tools: ToolSupport
    _literals: dict[str, Literals] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        name = "none" if self.tools.dialect is None else self.tools.dialect.name
        is_mute = self.template is not None and not self.tools.has_definitions
        shown = "; the chat template does not show tools" if is_mute else ""
        thoughts = "none" if self.template is None else self.template.thinking
        return f"tool calls: {name} ({self.tools.why}{shown}); thoughts: {thoughts}"

    def literals(self, template: ChatTemplate) -> Literals | None:
        """Returns what encodes messages that spell control tokens, for one of the model's templates."""
        if self.codec is None:
            return None
        if template.source not in self._literals:
            around = template.thinking.start, template.thinking.end
            self._literals[template.source] = Literals(self.codec, template.source, around)
        return self._literals[template.source]

    def markup(self, tools: ToolUse | None, thinking: Thinking, *, is_inside: bool) -> Markup:
        """Returns the marks of an answer's text.

        tools: how the answer uses tools; None if it calls none.
        is_inside: whether it begins inside of thoughts.
        """
        marks = {} if tools is None else dict(tools.dialect.marks)
        around = [thinking.start, thinking.end]
        if self.codec is not None and thinking.start:
            tokenizer = self.codec.tokenizer
            for i, (text, mark) in enumerate(zip(around, THOUGHT_MARKS, strict=True)):
                id = tokenizer.token_to_id(text)
                if id is not None:
                    marks[id], around[i] = mark, mark
        call_start = "" if tools is None else tools.dialect.call_start
        if not marks and not thinking.start and not call_start:
            return PLAIN
        return Markup(marks, *around, in_thought=is_inside, call_start=call_start)


def chat_model(
    template: ChatTemplate | None, facts: ModelFacts, setting: str, declared: ResponseTemplate | None = None
) -> ChatModel:
    """Returns how a model chats. Raises ValueError for a tool format that there is not.

    setting: ``ServerSettings.tool_format``.
    declared: template of answers that the checkpoint itself declares.
    """
    found = tool_format(template, setting, declared)
    has_definitions = template is not None and template.chosen([TOOL]).forms.has_tools
    dialect = None
    if found.form is not None and facts.codec is not None:
        dialect = format_dialect(found.form, facts.codec.tokenizer, facts.vocab_size)
    if found.template is not None and facts.codec is not None:
        tokens = apart_tokens(facts.codec.tokenizer, facts.vocab_size)
        dialect = TemplateDialect(found.template, tokens)
    return ChatModel(template, facts.codec, ToolSupport(dialect, found.why, has_definitions))
