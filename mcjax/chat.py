"""A user's message in the chat template of a model, as tokens.

Templates come with models, so they are run in Jinja's sandbox; messages come from users, so special
tokens that are spelled out in them stay text.
"""

from __future__ import annotations

import json
import secrets
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mcjax.text import special_tokens, tokenizer_settings


def chat_tokens(tokenizer: Any, folder: Path, message: str) -> list[int]:
    """Encodes one user's message in a folder's chat template, up to where the answer begins.

    Args:
      tokenizer: from `mcjax.text.open_tokenizer`.
      folder: holds chat_template.jinja, or tokenizer_config.json with `chat_template`.
      message: what the user says; special tokens in it are encoded as the text they are.

    Returns:
      Token ids.

    Raises:
      ValueError: if there is no template, or it cannot be applied.
    """
    template, names = find_template(folder), special_tokens(folder)

    def special(ids):
        return [i for i in ids if i in specials]

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    specials = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    mark = f"mark{secrets.token_hex(16)}"
    around = render(template, names, mark)
    if mark not in around:
        raise ValueError(f"the chat template of {folder} leaves the user's message out")
    whole = encode(render(template, names, message))
    if special(whole) == special(encode(around)):
        return whole
    # The message spells a special token, so it is encoded apart from what is around it.
    if render(template, names, f" {mark} ") == around:  # the template strips messages
        message = message.strip()
    parts = [encode(part) for part in around.split(mark)]
    tokenizer.encode_special_tokens = True
    try:
        own = encode(message)
    finally:
        tokenizer.encode_special_tokens = False
    ids = parts[0]
    for part in parts[1:]:
        ids = [*ids, *own, *part]
    return ids


def find_template(folder: Path) -> str:
    """Reads a folder's chat template: chat_template.jinja, else tokenizer_config.json's.

    Raises:
      ValueError: if it has none.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = tokenizer_settings(folder).get("chat_template")
    if isinstance(template, list):  # several of them, by name
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    if not isinstance(template, str):
        raise ValueError(
            f"{folder} has no chat template, neither chat_template.jinja nor chat_template in "
            "tokenizer_config.json; leave --chat out"
        )
    return template


def render(template: str, names: dict[str, str], message: str) -> str:
    """Renders a chat template around one user's message.

    Args:
      template: Jinja, with the names that transformers defines.
      names: the tokenizer's named special tokens.
      message: what the user says.

    Raises:
      ValueError: if the template is malformed, does what the sandbox forbids, or refuses.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    messages = [{"role": "user", "content": message}]
    try:
        return environment.from_string(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **names
        )
    except Exception as error:  # whatever the template's own code runs into
        raise ValueError(f"the chat template cannot be applied: {error}") from None


class _Generation(Extension):
    """Reads `{% generation %}`, by which templates mark the answer, as what it holds."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        """Takes the block's statements."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
