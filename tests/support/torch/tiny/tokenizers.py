"""Tiny tokenizers in the metadata of GGUF files."""

from typing import Any, Final

from gguf import GGUFWriter, TokenType
from transformers.convert_slow_tokenizer import bytes_to_unicode

VOCABULARY: Final = 320
TEXTS: Final = ("the other", "Hello there, the end.\n", " 42 + 7 = 49", "naïve café ☕", "a  b   c")
TEMPLATE: Final = (
    "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_WORDS: Final = ("he", "th", "the", "er", "re", "in", "an", "and", "other", "ell", "o,")
_CONTROL: Final = ("<|end|>", "<|user|>", "<|assistant|>")


def add_tokenizer(writer: GGUFWriter, kind: str) -> None:
    """Add a tokenizer of VOCABULARY tokens with a chat template. kind: "gpt2" or "llama"."""
    {"gpt2": _byte_pairs, "llama": _sentence_pieces}[kind](writer)
    writer.add_chat_template(TEMPLATE)


def _byte_pairs(writer: GGUFWriter) -> None:
    space = "Ġ"
    merges = ["h e", "t h", "t he", "e r", "r e", "i n", "a n", f"{space} the", f"{space} a", "l l"]
    tokens = [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in merges)]
    types = [TokenType.NORMAL] * len(tokens)
    tokens += _CONTROL
    types += [TokenType.CONTROL] * len(_CONTROL)
    _add(writer, "gpt2", tokens, types)
    writer.add_tokenizer_pre("default")
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index("<|end|>"))
    writer.add_eos_token_id(tokens.index("<|end|>"))
    writer.add_pad_token_id(tokens.index("<|end|>"))
    writer.add_add_bos_token(False)


def _sentence_pieces(writer: GGUFWriter) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 256]
    pieces = ["▁", *"abcdefghiklmnorstuy,.", "he", "th", "the", "▁the", "er", "in", "an", "▁a"]
    pieces += [text for text in _WORDS if text not in pieces]
    tokens += pieces
    types += [TokenType.NORMAL] * len(pieces)
    scores = [0.0] * (len(tokens) - len(pieces)) + [-float(rank) for rank in range(len(pieces))]
    tokens += _CONTROL[1:]
    types += [TokenType.CONTROL] * len(_CONTROL[1:])
    _add(writer, "llama", tokens, types)
    scores += [0.0] * (VOCABULARY - len(scores))
    writer.add_token_scores(scores)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)


def _add(writer: GGUFWriter, model: str, tokens: list[Any], types: list[Any]) -> None:
    """Add tokens, filled up with unused ones."""
    unused = VOCABULARY - len(tokens)
    assert unused >= 0
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens + [f"[unused{i}]" for i in range(unused)])
    writer.add_token_types(types + [TokenType.UNUSED] * unused)
