"""The reader of answers in any format: it follows the text with the format's own markers."""

import re
from collections.abc import Sequence

from jmoe.server.dialects.events import Arguments, CallEnd, CallStart, Event, Function, PlainText
from jmoe.server.dialects.format import Format, Tagged
from jmoe.server.dialects.reading.arguments import TaggedArguments, read_json, read_pythonic
from jmoe.server.dialects.reading.declared import argument_types
from jmoe.server.dialects.reading.scanner import Marker, Scanner, Waiting

MARKS = re.compile("[\ue000-\uf8ff]")
NUMBERED = re.compile(r"(.*):([0-9]+)", re.S)


class FormatReader:
    """Reads one answer (``events.Reader``).

    Arguments are given as they come, except Python's and values between tags that are no pure text. White
    space before a call and after the last one belongs to nobody if no text is next to it. A call that the
    answer's end cuts keeps what was read of it and has no ``CallEnd``; before its name is whole there is no
    call. Private characters of the format's markers never get into the text.
    """

    def __init__(self, form: Format, functions: Sequence[Function] = ()):
        self.form = form
        self.types = {function.name: argument_types(function.parameters) for function in functions}
        self.source, self.events = Scanner(), list[Event]()
        self.marks = dict.fromkeys(map(ord, MARKS.findall("".join(form.texts))))
        self.spaces: list[str] = []  # white space after a call or the begin, which may belong to nobody
        self.is_fresh, self.has_called = True, False
        self.steps = self._answer()

    def feed(self, text: str) -> list[Event]:
        self.source.feed(text)
        return self._read()

    def close(self) -> list[Event]:
        self.source.is_closed = True
        return self._read()

    def _read(self) -> list[Event]:
        next(self.steps, None)
        events, self.events = self.events, []
        return events

    # ---- text ------------------------------------------------------------------------------------

    def _answer(self) -> Waiting[None]:
        while not self.source.is_done:
            if (yield from self._text()):
                self.spaces.clear()
                yield from self._calls()
                self.is_fresh = True
        if not self.has_called:
            self._say("")

    def _text(self) -> Waiting[bool]:
        """Reads text up to a call, and returns whether one begins."""
        source, form = self.source, self.form
        if self.is_fresh:
            yield from source.take_spaces(self.spaces.append)
        if not form.is_at_start:
            trigger = Marker(form.trigger)
            if self.is_fresh and self.has_called:
                yield from source.drop_cut([trigger])
            if (yield from source.take_until([trigger], self._say)) is None:
                return False
            if (yield from source.expect(Marker(form.begin + form.opens))):
                return True
            if not source.is_done:  # the marker stands in a text
                source.take(source.at + len(trigger.parts[0]), self._say)
            return False
        if not self.has_called and (yield from source.next_of(self._openings())) is not None:
            return (yield from source.expect(Marker(form.begin + form.opens)))
        yield from source.take_until([], self._say)
        return False

    def _openings(self) -> list[Marker]:
        """Returns what begins a call at the start of an answer. Where that is only a bracket, it is one with
        the name of a function."""
        begin, form = self.form.begin, self.form
        if form.opens:
            return [Marker(begin + form.opens)]
        return [Marker(f"{begin}{name}{form.named}") for name in self.types]

    def _say(self, text: str) -> None:
        text = "".join(self.spaces) + text.translate(self.marks)
        self.spaces.clear()
        self.is_fresh = False
        if text:
            self.events.append(PlainText(text))

    # ---- calls -----------------------------------------------------------------------------------

    def _calls(self) -> Waiting[None]:
        """Reads from the end of the first call's opening up to the end of the calls."""
        form, source = self.form, self.source
        more, end = Marker(form.between + form.opens), Marker(form.end)
        followers = [marker for marker in (end, more) if marker.parts]
        while (yield from self._call()) and form.is_list:
            yield from source.take_spaces(_drop)
            found = yield from source.next_of(followers)
            if found is None:
                yield from source.drop_cut(followers)
                return
            yield from source.expect(found)
            if found is end:
                return

    def _call(self) -> Waiting[bool]:
        """Reads a call from its name on. Returns whether it is whole."""
        form, source = self.form, self.source
        name = yield from self._name()
        if name is None:
            return False
        if form.is_numbered and (found := NUMBERED.fullmatch(name)) is not None:
            self.events.append(CallStart(found[1], f"functions.{name}"))
            name = found[1]
        else:
            self.events.append(CallStart(name))
        self.has_called = True
        match form.arguments:
            case Tagged():
                steps = TaggedArguments(form.arguments, form.closes, self.types.get(name, {}))
                is_whole = yield from steps.read(source, self._give)
            case "pythonic":
                is_whole = yield from read_pythonic(source, self._give)
            case _:
                is_whole = yield from read_json(source, self._give)
        if not is_whole:
            return False
        self.events.append(CallEnd())
        if not form.closes:
            return True
        yield from source.take_spaces(_drop)
        return (yield from source.expect(Marker(form.closes)))

    def _name(self) -> Waiting[str | None]:
        """Reads a function's name and what follows it; None if the answer ends before."""
        form, parts = self.form, list[str]()
        named = Marker(form.named)
        ends = [named] if named.parts else []
        if isinstance(form.arguments, Tagged):  # a call without arguments may leave out what follows the name
            ends += [Marker(form.arguments.key), Marker(form.closes)]
        found = yield from self.source.take_until(ends, parts.append)
        if found is None:
            return None
        if found is named:
            yield from self.source.expect(named)
        return "".join(parts).strip()

    def _give(self, text: str) -> None:
        if text:
            self.events.append(Arguments(text))


def _drop(text: str) -> None:
    """White space that belongs to nobody."""
