"""The tokenizer in a GGUF file, and the tokens that begin and end texts."""

import warnings
from pathlib import Path
from typing import Any, Final

from tokenizers import pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from q4jit.errors import GGUFError, expected, short_name
from q4jit.transformers.configs import check_special
from q4jit.weights.gguf.file import GGUFFile

# Kinds of byte pairs whose texts begin with a token, which llama.cpp adds if the file says nothing
_STARTED: Final = ("llama3", "llama-v3", "llama-bpe", "tekken")
# Kinds of byte pairs, by `tokenizer.ggml.pre`, as llama.cpp's `llama-vocab.cpp` splits them
_AS_GPT2: Final = ("default", "gpt-2", "gpt2")
_SINGLE_DIGITS: Final = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
# Tokens that end an answer, by which llama.cpp knows them in files that name only one
_ENDS: Final = (
    "<|eot_id|>",
    "<|im_end|>",
    "<end_of_turn>",
    "<|end|>",
    "<|endoftext|>",
    "<|eom_id|>",
)


def tokenizer_of(file: GGUFFile) -> PreTrainedTokenizerFast:
    """Return the tokenizer in a file. Raises GGUFError for a file without one."""
    path = Path(file.paths[0])
    for key in ("tokenizer.ggml.model", "tokenizer.ggml.tokens"):
        if key not in file.metadata:
            what = "a file with a tokenizer"
            raise GGUFError(expected(what, f"one without the key {key}", where=str(path)))
    check_special(file)
    try:
        loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True
        )
    except Exception as error:  # whatever a damaged vocabulary leads to
        problem = f"{type(error).__name__}: {error}"
        raise GGUFError(f"{path}: transformers cannot read the tokenizer: {problem}") from error
    kind = file.metadata.get("tokenizer.ggml.pre")
    if "tokenizer.ggml.add_bos_token" not in file.metadata:
        _add_start(loaded, kind)
    if file.metadata["tokenizer.ggml.model"] == "gpt2":
        _split_as(loaded, kind, path)
    loaded.padding_side = "left"  # as `generate` asks for with several texts
    return loaded


def _add_start(tokenizer: Any, kind: object) -> None:
    """Let texts begin with a token if those of this kind of tokenizer do."""
    if isinstance(kind, str) and kind in _STARTED:
        tokenizer.add_bos_token = True


def _split_as(tokenizer: Any, kind: object, path: Path) -> None:
    """Split texts as a kind of byte pairs does. transformers splits unknown kinds as GPT-2's."""
    if not isinstance(kind, str) or kind in GGUF_PRE_TOKENIZER_SPLITS or kind in _AS_GPT2:
        return
    if kind in _SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
        return
    warnings.warn(
        f"{path}: texts are split like GPT-2's, because the kind {short_name(kind)} of "
        "tokenizer.ggml.pre is unknown; some may become other tokens than those of llama.cpp",
        stacklevel=4,
    )


def set_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Let every token that ends an answer end generation, also those the file does not name."""
    config: Any = model.generation_config
    named = config.eos_token_id
    ids = list(named) if isinstance(named, list) else [] if named is None else [named]
    vocabulary, size = tokenizer.get_added_vocab(), model.config.get_text_config().vocab_size
    # tokenizers of transformers may add tokens of their own after those of the file
    ids += [vocabulary[token] for token in _ENDS if vocabulary.get(token, size) < size]
    config.eos_token_id = list(dict.fromkeys(ids)) or None
    if config.pad_token_id is None and config.eos_token_id:
        config.pad_token_id = config.eos_token_id[0]
