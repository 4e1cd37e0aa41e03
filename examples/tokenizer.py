"""The tokeniser and the chat template in the metadata of a GGUF file."""

import codecs
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import BuiltinMethodType
from typing import Any, NoReturn

import numpy as np
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.filters import FILTERS
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from q4jit import GGUFError
from q4jit.errors import expected

__all__ = ["GGUFTokenizer", "render_chat"]

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
MAX_CHAT_CHARACTERS = 1 << 24
MAX_SIZE = 1 << 20  # of one value that a template makes: elements, columns, or bits of a number
SIZED_FILTERS = ("batch", "center", "indent", "round", "slice", "tojson")
# A width or precision of more than six digits, or one that comes from an argument.
WIDE_PERCENT = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(?:\*|\d{7}|\d*\.(?:\*|\d{7}))")
WIDE_BRACES = re.compile(r"\{[^{}]*:[^{}]*(?:\{|\d{7})")
END_OF_TURN = ("<|im_end|>",)


def _bytes_of_characters() -> dict[str, int]:
    """Return the byte of each character in GPT-2's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


class GGUFTokenizer:
    """Converts text to token ids and back, with the vocabulary and merges of a GGUF file."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        _check_kind(metadata)
        self.tokens = _texts(metadata, "tokenizer.ggml.tokens")
        types = _token_types(metadata, len(self.tokens))
        merges = [tuple(pair.split(" ")) for pair in _texts(metadata, "tokenizer.ggml.merges")]
        self._special = {i for i, kind in enumerate(types) if kind == CONTROL}
        self._added = self._special | {i for i, kind in enumerate(types) if kind == USER_DEFINED}
        self._encoder = self._build(merges)
        self._byte_of = _bytes_of_characters()
        self.bos = self._token_id(metadata, "bos")
        self.eos = self._token_id(metadata, "eos")
        self.add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", False))
        if self.add_bos and self.bos is None:
            raise GGUFError("tokenizer.ggml.add_bos_token needs a bos_token_id, which is missing")
        ends = (self.eos, self._token_id(metadata, "eot"), *map(self._control, END_OF_TURN))
        self.stop_ids = frozenset(i for i in ends if i is not None)

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Return the token ids of a text. Control tokens that it spells out become such tokens."""
        start = [self.bos] if add_bos and self.add_bos and self.bos is not None else []
        return start + list(self._encoder.encode(text, add_special_tokens=False).ids)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token, often only a part of a UTF-8 character."""
        text = self.tokens[token]
        if token in self._added or not self._byte_of.keys() >= set(text):
            return text.encode()
        return bytes(self._byte_of[character] for character in text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of some tokens. Bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def stream(self) -> "TextStream":
        """Return a decoder that takes one token at a time."""
        return TextStream(self)

    def token_text(self, token: int | None) -> str:
        """Return the vocabulary's text of a token, and "" for None."""
        return "" if token is None else self.tokens[token]

    def _build(self, merges: Sequence[tuple[str, ...]]) -> Tokenizer:
        vocabulary = {token: i for i, token in enumerate(self.tokens)}
        if bad := next((pair for pair in merges if len(pair) != 2), None):
            raise GGUFError(f"tokenizer.ggml.merges: {' '.join(bad)!r} is not a pair of tokens")
        pairs = [(left, right) for left, right in merges]
        try:
            tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
        except Exception as error:  # the library raises bare Exception
            raise GGUFError(f"tokenizer.ggml.merges do not fit the vocabulary: {error}") from error
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        tokenizer.add_tokens(
            [
                AddedToken(self.tokens[i], special=i in self._special, normalized=False)
                for i in sorted(self._added)
            ]
        )
        return tokenizer

    def _control(self, text: str) -> int | None:
        return next((i for i in sorted(self._special) if self.tokens[i] == text), None)

    def _token_id(self, metadata: Mapping[str, Any], name: str) -> int | None:
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is None:
            return None
        if not isinstance(token, int) or not 0 <= token < len(self.tokens):
            raise GGUFError(
                expected(
                    f"0 to {len(self.tokens) - 1}",
                    repr(token),
                    where=f"tokenizer.ggml.{name}_token_id",
                )
            )
        return token


class TextStream:
    """Turns tokens into text one by one, and keeps bytes until their character is complete."""

    def __init__(self, tokenizer: GGUFTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return the text that this token completes."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """Return the rest: U+FFFD if the last character is incomplete, else ""."""
        return self._decoder.decode(b"", final=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, made stricter.

    Access to an unsafe attribute is an error, not an empty string. A huge value made in one step,
    by an operator, a width or a count, is an error too.
    """

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters |= {name: _bounded(self.filters[name]) for name in SIZED_FILTERS}
        self.filters["format"] = _format
        del self.globals["lipsum"]  # it makes any number of random paragraphs

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`. Raises SecurityError if the result would be huge."""
        if operator == "%":
            _check_percent(left)
        elif _result_size(operator, left, right) > MAX_SIZE:
            raise SecurityError(f"the result of {operator!r} is too large")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function. Raises SecurityError for a method of a text with a huge width."""
        if isinstance(function, BuiltinMethodType) and isinstance(
            function.__self__, str | bytes | int
        ):
            _check_sizes([*args, *kwargs.values()])
        return super().call(context, function, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return Jinja's safe form of a text's `format` method; None for another value."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and WIDE_BRACES.search(value.__self__):
            raise SecurityError("a width in a format is too large")
        return wrapped

    def unsafe_undefined(self, obj: object, attribute: str) -> NoReturn:
        """Raise SecurityError for an attribute that could lead out of the sandbox."""
        raise SecurityError(f"{attribute!r} of a {type(obj).__name__} cannot be used")


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter of Jinja's that raises SecurityError for huge numbers as arguments."""
    # The value is the first argument, or the second if Jinja passes the filter its context.
    first = 2 if hasattr(function, "jinja_pass_arg") else 1

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_sizes([*args[first:], *kwargs.values()])
        return function(*args, **kwargs)

    return checked


def _format(text: object, *args: Any, **kwargs: Any) -> Any:
    _check_percent(text)
    return FILTERS["format"](text, *args, **kwargs)


def _check_percent(text: object) -> None:
    if isinstance(text, str) and WIDE_PERCENT.search(text):
        raise SecurityError("a width in a format is too large")


def _check_sizes(values: Iterable[object]) -> None:
    if any(isinstance(value, int) and abs(value) > MAX_SIZE for value in values):
        raise SecurityError(f"a width or count is over {MAX_SIZE}")


def _result_size(operator: str, left: object, right: object) -> int:
    """Return the elements of a repeated sequence, or about the bits of a number."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        return bits * max(right, 0) if operator == "**" else bits + right.bit_length()
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | bytes | list | tuple) and isinstance(count, int):
            return len(sequence) * count
    return 0


def render_chat(
    template: str, messages: Sequence[Mapping[str, str]], tokenizer: GGUFTokenizer
) -> str:
    """Return the prompt that a file's chat template writes for some messages.

    A template is a program from a downloaded file, so it runs in Jinja's immutable sandbox. The
    size of each step and of the whole answer is limited. Time and total memory are not: a template
    that keeps joining texts still grows. Raises GGUFError if the template fails.
    """
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise_exception
    parts: list[str] = []
    length = 0
    try:
        for part in environment.from_string(template).generate(
            messages=messages,
            add_generation_prompt=True,
            bos_token=tokenizer.token_text(tokenizer.bos),
            eos_token=tokenizer.token_text(tokenizer.eos),
        ):
            parts.append(part)
            length += len(part)
            if length > MAX_CHAT_CHARACTERS:
                raise GGUFError(f"the chat template wrote over {MAX_CHAT_CHARACTERS} characters")
    except GGUFError:
        raise
    except Exception as error:  # all its errors, RecursionError and MemoryError too
        raise GGUFError(f"the chat template failed: {type(error).__name__}: {error}") from error
    return "".join(parts)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _check_kind(metadata: Mapping[str, Any]) -> None:
    kind = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise GGUFError(
            expected(
                "model 'gpt2' with pre 'smollm'",
                f"model {kind[0]!r} with pre {kind[1]!r}",
                where="tokenizer.ggml",
            )
        )


def _texts(metadata: Mapping[str, Any], key: str) -> Sequence[str]:
    value = metadata.get(key)
    if not isinstance(value, tuple):
        kind = "nothing" if value is None else f"a value of type {type(value).__name__}"
        raise GGUFError(expected("an array of strings", kind, where=key))
    return value


def _token_types(metadata: Mapping[str, Any], count: int) -> list[int]:
    value = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(value, np.ndarray) or len(value) != count:
        kind = f"{len(value)} numbers" if isinstance(value, np.ndarray) else repr(value)
        raise GGUFError(
            expected(
                f"a number for each of {count} tokens", kind, where="tokenizer.ggml.token_type"
            )
        )
    return [int(kind) for kind in value]
