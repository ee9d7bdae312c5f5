"""An Ollama ``Modelfile``: which file, the chat template in Go's language, what ends an answer, the system message.

A chat template is a program (Jinja), and Ollama wants another one (Go's ``text/template``). It is not translated: a few
conversations are rendered, and what stands before and after each turn is read off. Only if these pieces give every one
of the conversations again, letter by letter, is the template written; otherwise the file says that it could not be
told. (docs.ollama.com: Modelfile, and template/template.go for ``.Messages``.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.errors import ModelError
from trimtab.evaluation.generation import end_tokens
from trimtab.models.chat_template import render, spelled_end

_SYSTEM, _USER, _ANSWER = "Zsy", "Zus", "Zas"  # words that no template writes itself
Turn = tuple[str, str]


@dataclass(frozen=True)
class Pieces:
    """What a template writes around the turns of a conversation.

    Attributes:
        system, user, assistant: before and after a turn of that role.
        generation: what an answer follows.
        default: the system message that stands where there is none; empty for none.
        inside: the system message stands inside the first turn of the user.
    """

    user: Turn
    assistant: Turn
    generation: str
    system: Turn | None = None
    default: str = ""
    inside: bool = False

    def text(self, messages: Sequence[dict[str, str]]) -> str:
        """What the template would write of ``messages``, without the token that begins a text."""
        turns = list(messages)
        if self.default and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.default})
        written, held = "", ""
        for turn in turns:
            role, content = turn["role"], turn["content"]
            if role == "system":
                assert self.system is not None
                held = self.system[0] + content + self.system[1]
                written += "" if self.inside else held
                continue
            before, after = self.user if role == "user" else self.assistant
            written += before + (held if self.inside and role == "user" else "") + content + after
            held = ""
        return written + self.generation

    def in_go(self) -> str:
        """The same as Ollama's template."""
        before_user, after_user, before_answer, after_answer = map(_literal, (*self.user, *self.assistant))
        opening = of_system = held = ""
        if self.system is not None:
            before, after = map(_literal, self.system)
            own = before + "{{ .Content }}" + after
            if self.inside:
                opening, own = '{{ $system := "" }}', "{{ $system = .Content }}"
                held = "{{ if $system }}" + before + "{{ $system }}" + after + '{{ $system = "" }}{{ end }}'
            of_system = '{{ if eq .Role "system" }}' + own + "{{ end }}"
        return "".join(
            [
                *(opening, "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}", of_system),
                *('{{ if eq .Role "user" }}', before_user, held, "{{ .Content }}", after_user, "{{ end }}"),
                *('{{ if eq .Role "assistant" }}', before_answer, "{{ .Content }}"),
                *("{{ if not $last }}", after_answer, "{{ end }}{{ end }}"),
                *('{{ if and (ne .Role "assistant") $last }}', _literal(self.generation), "{{ end }}{{ end }}"),
            ]
        )


def _literal(text: str) -> str:
    """``text`` inside a template of Go's."""
    return '{{ "{{" }}'.join(text.split("{{"))


def pieces_of(tokenizer: Any) -> Pieces | None:
    """What the chat template of ``tokenizer`` writes around turns; None where it does anything else than that."""
    if not isinstance(getattr(tokenizer, "chat_template", None), str):
        return None
    # Where the tokenizer begins every text with a token, llama.cpp puts it there itself.
    begin = tokenizer.bos_token or ""
    begin = begin if begin and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else ""

    def written(*turns: tuple[str, str], prompt: bool = False) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return str(render(tokenizer, messages, add_generation_prompt=prompt)).removeprefix(begin)

    try:
        one = written(("user", _USER))
        asked = written(("user", _USER), prompt=True)
        answered = written(("user", _USER), ("assistant", _ANSWER))
        both = written(("user", _USER), ("assistant", _ANSWER), ("user", "Zut"))
        before_user, after_user = _around(one, _USER)
        after_answer = _around(answered, _ANSWER)[1]
        middle, last = _around(_around(both, _ANSWER)[1], "Zut")
        if last != after_user:
            return None
        user = (_without(middle, after_answer), after_user)
        between = _around(_around(answered, _USER)[1], _ANSWER)[0]
        assistant = (_without(between, after_user), after_answer)
        bare = Pieces(user, assistant, _without(asked, one))
        found = _with_system(bare, written, before_user.removesuffix(user[0]))
        return found if found is not None and _agrees(found, written) else None
    except (ModelError, ValueError):
        return None


def _around(text: str, word: str) -> Turn:
    """What stands before and after ``word``. Raises ValueError if it does not stand there once."""
    before, after = text.split(word)
    return before, after


def _without(text: str, start: str) -> str:
    """``text`` after ``start``. Raises ValueError if it does not begin so."""
    if not text.startswith(start):
        raise ValueError(start)
    return text[len(start) :]


def _with_system(found: Pieces, written: Any, head: str) -> Pieces | None:
    """``found`` with what stands around a system message; ``head`` stands before a conversation without one."""
    user, assistant, generation = found.user, found.assistant, found.generation
    try:
        before, rest = _around(written(("system", _SYSTEM), ("user", _USER)), _SYSTEM)
    except (ModelError, ValueError):  # the template knows no system message
        return found if not head else None
    after = _around(rest, _USER)[0]
    if after.endswith(user[0]) and user[0]:
        system = (before, after.removesuffix(user[0]))
        if not head:
            return Pieces(user, assistant, generation, system=system)
        if head.startswith(system[0]) and head.endswith(system[1]) and len(head) >= len(system[0]) + len(system[1]):
            default = head[len(system[0]) : len(head) - len(system[1])]
            return Pieces(user, assistant, generation, system=system, default=default)
        return None
    if before.startswith(user[0]) and not head:
        inside = (before.removeprefix(user[0]), after)
        return Pieces(user, assistant, generation, system=inside, inside=True)
    return None


def _agrees(found: Pieces, written: Any) -> bool:
    """Whether the pieces give conversations that they were not read off, letter by letter."""
    chats: list[list[Turn]] = [
        [("user", "Zeb ra")],
        [("user", "Zeb"), ("assistant", "Zin c"), ("user", "Zon e")],
        [("user", "Zeb"), ("assistant", "Zinc"), ("user", "Zone"), ("assistant", "Zip"), ("user", "Zest")],
    ]
    if found.system is not None:
        chats += [[("system", "Zoo m"), *chat] for chat in chats]
    return all(
        found.text([{"role": role, "content": content} for role, content in chat]) == written(*chat, prompt=True)
        for chat in chats
    )


def modelfile(
    tokenizer: Any, model: Any, file: str, *, adapter: str | None = None, system: str | None = None
) -> tuple[str, list[str]]:
    """The text of a Modelfile for the GGUF ``file``, with an ``adapter`` beside it; and what the user should know."""
    lines, told = [f"FROM {file}"], []
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    pieces = pieces_of(tokenizer)
    if system and pieces is not None and pieces.system is None:
        raise ModelError("--system: the chat template has no place for a system message, so Ollama would leave it out")
    if pieces is not None and '"""' not in pieces.in_go():
        lines.append(f'TEMPLATE """{pieces.in_go()}"""')
        system = system if system is not None else pieces.default
    elif getattr(tokenizer, "chat_template", None):
        lines.append("# The chat template does more than write marks around turns, so Ollama has to know it by itself.")
        told.append("Modelfile: the chat template could not be put into Ollama's language; check what Ollama takes")
    if system:
        if '"""' in system:
            raise ModelError('--system: a system message with """ in it cannot be said in a Modelfile')
        lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in _stops(tokenizer, model)]
    return "\n".join(lines) + "\n", told


def _stops(tokenizer: Any, model: Any) -> list[str]:
    """The texts that end an answer."""
    found = [str(tokenizer.convert_ids_to_tokens(token)) for token in end_tokens(model, tokenizer)]
    found.append(spelled_end(tokenizer))
    return [stop for stop in dict.fromkeys(found) if stop.strip() and '"' not in stop and "\n" not in stop]
