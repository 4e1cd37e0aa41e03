"""The tokeniser and the chat template in the metadata of a GGUF file."""

import codecs
import json
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from q4jit import GGUFError
from q4jit.errors import expected

__all__ = ["GGUFTokenizer", "render_chat"]

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
CHAT_CHILD = Path(__file__).with_name("chat_child.py")
# Templates of real models take a few milliseconds, and write no more than messages and tools.
MAX_CHAT_SECONDS, MAX_CHAT_BYTES, MAX_CHAT_CHARACTERS = 2, 256 << 20, 1 << 24
# GGUF's names of special tokens, and the template's.
SPECIAL_TOKENS = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "seperator": "sep_token",  # GGUF's spelling
    "padding": "pad_token",
    "cls": "cls_token",
    "mask": "mask_token",
}
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
        special = {text: self._token_id(metadata, name) for name, text in SPECIAL_TOKENS.items()}
        self.special_tokens = {
            text: self.tokens[token] for text, token in special.items() if token is not None
        }
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


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], tokenizer: GGUFTokenizer
) -> str:
    """Return the prompt that a file's chat template writes for some messages.

    The template sees the variables that transformers gives it: `tools` and `documents` are None,
    and a special token that the file lacks is undefined. It runs in a process of its own, which may
    use little time and memory (`chat_child.py`). Raises GGUFError if the template fails.
    """
    variables = {
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        **tokenizer.special_tokens,
    }
    limits = map(str, (MAX_CHAT_SECONDS, MAX_CHAT_BYTES, MAX_CHAT_CHARACTERS))
    try:
        done = subprocess.run(
            [sys.executable, "-P", CHAT_CHILD, *limits],
            input=json.dumps({"template": template, "variables": variables}).encode(),
            capture_output=True,
            timeout=20 * MAX_CHAT_SECONDS,  # the child's own limit counts its CPU time only
            check=False,
        )
    except subprocess.TimeoutExpired:
        status, problem = -signal.SIGXCPU, ""
    else:
        if done.returncode == 0:
            return done.stdout.decode()
        # the child's message, or the last line of a traceback
        lines = done.stderr.decode(errors="replace").rstrip()
        status, problem = done.returncode, lines.rpartition("\n")[2]
    if status == -signal.SIGXCPU:
        problem = f"it ran for over {MAX_CHAT_SECONDS} s"
    elif status < 0:
        problem = f"its process was ended by {signal.Signals(-status).name}"
    raise GGUFError(f"the chat template failed: {problem}")


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
