"""What is put to a model: the prompt that asks as the training rows did, and the questions of a file.

prompt_of("chat", "Is berth seven free?", tokenizer, system="You are a clerk.")
questions_in("questions.txt")       # one a line
questions_in("rows.jsonl")          # what each row asks; its answer, where it has one, is left out
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from trimtab.data import forms
from trimtab.data.forms._reading import Reading
from trimtab.data.forms._turns import with_less
from trimtab.data.forms.chat import Chat
from trimtab.data.opening import is_table
from trimtab.data.rows import Row
from trimtab.data.sources import read_rows
from trimtab.errors import DataError, TrimtabWarning
from trimtab.models.chat_template import is_in

Message = dict[str, Any]

_ASKING = ("prompt", "question", "instruction", "source", "context", "input", "text")


@dataclass(frozen=True)
class Question:
    """A question: its words, or a conversation that ends with the user's turn; and the row's own system message.

    ``row``: where it comes from, so that what it has besides is put as in training.
    """

    text: str
    messages: tuple[Message, ...] = ()
    system: str | None = None
    row: Row | None = None

    def prompt(self, form: str | None, tokenizer: Any, system: str | None) -> str:
        """The prompt that asks it as rows of ``form`` do; None: the text as it is."""
        if not self.messages:
            trained = _as_trained(form, self.row, tokenizer) if self.row is not None and form is not None else None
            if trained is not None and (system is None or self.system is not None):
                return trained
            return prompt_of(form, self.text, tokenizer, self.system or system)
        first, *others = self.messages
        own = first.get("role") == "system"
        ask = partial(rendered, tokenizer=tokenizer, system=None if own else system, row=self.row)
        prompt = ask(self.messages)

        def is_same(less: Sequence[Message]) -> bool:
            try:
                return ask(less) == prompt
            except DataError:  # the template does not do without
                return False

        silent = [what for what, less in with_less(self.messages) if is_same(less)]
        if own and others and not is_in(str(first.get("content")), prompt) and is_same(others):
            silent.append("the system messages")
        for what in silent:
            told = f"the chat template leaves {what} of the rows out, so the model does not read them"
            warnings.warn(told, TrimtabWarning, stacklevel=2)
        return prompt


def prompt_of(form: str | None, text: str, tokenizer: Any, system: str | None = None) -> str:
    """The prompt that asks ``text`` as rows of ``form`` do; None: the text as it is.

    Raises DataError if the form has no place for ``system``, if the tokenizer has no template, or if the text is none.
    """
    try:
        f"{text}{system or ''}".encode()
    except UnicodeEncodeError:
        raise DataError("the prompt is not text in UTF-8; write it so, or give it in a file") from None
    if not text.strip():
        raise DataError("the prompt is empty: there is nothing to go on from")
    if form is None:
        if system is not None:
            raise DataError(
                "--system: the prompt is put as it is, without a place for it; add --chat for the chat template"
            )
        return text
    if form == "chat":
        return rendered([{"role": "user", "content": text}], tokenizer, system)
    return forms.find(form).prompt(text, tokenizer, system=system or "")


def _as_trained(form: str, row: Row, tokenizer: Any) -> str | None:
    """The prompt of ``row`` in training; None if it is not of the form. Its answer may be missing."""
    kind = forms.find(form)
    missing = [key for key in kind.keys if row.value.get(key) is None]
    try:
        filled = replace(row, value={**row.value, **dict.fromkeys(missing[:1], "-")})
        example = kind.example(filled, Reading(tokenizer)) if kind.fits(filled) else None
    except DataError:
        return None
    return example.prompt if example is not None and example.prompt.strip() else None


def system_message(text: str | None) -> list[Message]:
    """The system message as the beginning of a conversation; nothing without one."""
    return [{"role": "system", "content": text}] if text else []


def rendered(messages: Sequence[Message], tokenizer: Any, system: str | None = None, row: Row | None = None) -> str:
    """A conversation after a ``system`` message as its template writes it, up to where the assistant speaks; with the
    tools of the ``row`` that it is from.

    Raises DataError without a template, or where that leaves the system message out.
    """
    require_template(tokenizer)
    chat = forms.find("chat")
    assert isinstance(chat, Chat)
    prompt = chat.render([*system_message(system), *messages], tokenizer, row)
    if system and not is_in(system, prompt) and prompt == chat.render([*messages], tokenizer, row):
        raise DataError(
            "the chat template leaves the system message out, so the model would not read it; put it at the beginning "
            "of the question"
        )
    return prompt


def require_template(tokenizer: Any) -> None:
    """Raise DataError, which says what to do, if ``tokenizer`` has no chat template."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template, so it is unknown how this model is talked "
            "to. Train a run with model.chat_template in its YAML, or ask by trimtab generate --plain"
        )


def questions_in(source: str) -> list[Question]:
    """The questions of a file: rows, or a text of one question a line; ``-`` is standard input. Blank lines are none.

    Raises DataError if there is none, or a row that asks nothing.
    """
    if is_table(source, ".json"):
        found = [question_of(row) for row in read_rows(source, root=Path.cwd())]
    else:
        found = [Question(line) for line in lines_of(source) if line.strip()]
    if not found:
        raise DataError(f"{source}: there is no question in it")
    return found


def question_of(said: Row) -> Question:
    """What a row asks. Raises DataError, which names the row, for one that asks nothing."""
    row = said.value
    messages = row.get("messages", row.get("prompt"))
    if isinstance(messages, list) and all(isinstance(each, dict) for each in messages):
        while messages and messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        if messages:
            return Question(str(messages[-1].get("content")), tuple(messages), row=said)
    for key in _ASKING:
        if isinstance(text := row.get(key), str) and text.strip():
            extra = row.get("input") if key == "instruction" else None
            system = row.get("system")
            words = f"{text}\n\n{extra}" if extra else text
            return Question(words, system=system if isinstance(system, str) and system else None, row=said)
    raise DataError(
        f"{said.place}: the row asks nothing; expected 'messages', or a text under one of {', '.join(_ASKING)}; keys "
        f"found: {', '.join(row) or 'none'}"
    )


def lines_of(source: str) -> Iterator[str]:
    """The lines of a file, without their ends; ``-`` is standard input. Raises DataError if it cannot be read."""
    try:
        said = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        yield from (line.removesuffix("\r") for line in said.decode("utf-8-sig").split("\n"))
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: expected text in UTF-8 ({error})") from None
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror})") from None
