"""Tokenizers behind one small interface: trained byte-level BPE, a tokenizer.json, a hub model, bytes."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from distmuon.errors import DataError
from distmuon.train.data.config import TokenizerSpec


class TextTokenizer:
    """Turns texts into token ids and back; special tokens inside a text are ordinary text."""

    def __init__(self, inner: Tokenizer, eos_token: str, where: str) -> None:
        """Wrap a tokenizer.

        Args:
            inner: the tokenizer; truncation and padding are switched off.
            eos_token: token that ends a document.
            where: what the tokenizer is called in messages.

        Raises:
            DataError: ``eos_token`` is not in the vocabulary.
        """
        inner.no_truncation()
        inner.no_padding()
        # Otherwise a document that spells the end-of-document token would end itself.
        inner.encode_special_tokens = True
        eos_id = inner.token_to_id(eos_token)
        if eos_id is None:
            special = [token.content for token in inner.get_added_tokens_decoder().values() if token.special]
            raise DataError(
                f'tokenizer {where} has no token "{eos_token}"; '
                f"set data.eos_token to one of its special tokens: {', '.join(special) or '(none)'}."
            )
        self._inner = inner
        self.eos_id: int = eos_id
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Encode texts.

        Args:
            texts: documents.

        Returns:
            The token ids of each document, without an end-of-document token.
        """
        return [encoding.ids for encoding in self._inner.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Decode token ids.

        Args:
            ids: token ids.

        Returns:
            The text, end-of-document tokens included.
        """
        return str(self._inner.decode(ids, skip_special_tokens=False))

    def to_json(self) -> str:
        """The content of a tokenizer.json.

        Returns:
            JSON text.
        """
        return str(self._inner.to_str(pretty=False))


def train_bpe(texts: Iterator[str], size: int, eos_token: str, documents: int) -> TextTokenizer:
    """Train byte-level BPE; the result depends on the texts alone, not on the number of threads.

    Args:
        texts: training documents.
        size: vocabulary entries, the 256 bytes and ``eos_token`` included.
        eos_token: token that ends a document.
        documents: number of ``texts``.

    Returns:
        The tokenizer; little text may give it fewer than ``size`` entries.
    """
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[eos_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer=trainer, length=documents)
    return TextTokenizer(inner, eos_token, f"train:bpe:{size}")


def byte_tokenizer(eos_token: str) -> TextTokenizer:
    """The 257-entry tokenizer whose ids are the byte values and, at 256, the end of a document.

    Args:
        eos_token: token that ends a document.

    Returns:
        The tokenizer.
    """
    # ByteLevel spells printable bytes as themselves and the others, in order, from U+0100 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(eos_token, special=True, normalized=False)])
    return TextTokenizer(inner, eos_token, "bytes")


def tokenizer_file(spec: TokenizerSpec) -> Path | None:
    """The tokenizer.json behind a "file:" or "hf:" spec.

    Args:
        spec: the tokenizer.

    Returns:
        Its path, downloaded first if need be; None for tokenizers that need no file.

    Raises:
        DataError: the file does not exist or cannot be downloaded.
    """
    if spec.kind == "file":
        path = Path(spec.target).expanduser()
        if not path.is_file():
            raise DataError(f'data.tokenizer "{spec.text}" names no file; give the path of a tokenizer.json.')
        return path
    if spec.kind == "hf":
        # Imported here because the client reads its environment variables when it is imported.
        hub: Any = importlib.import_module("huggingface_hub")
        try:
            return Path(hub.hf_hub_download(spec.target, "tokenizer.json"))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f'data.tokenizer "{spec.text}" cannot be downloaded ({reason}); check name and network, '
                f"or run: hf download {spec.target} tokenizer.json"
            ) from error
    return None


def load_tokenizer(text: str, eos_token: str, where: str) -> TextTokenizer:
    """Load the content of a tokenizer.json.

    Args:
        text: JSON text.
        eos_token: token that ends a document.
        where: what the tokenizer is called in messages.

    Returns:
        The tokenizer.

    Raises:
        DataError: the text is not a tokenizer, or lacks ``eos_token``.
    """
    try:
        json.loads(text)  # the parser of `tokenizers` raises a bare Exception
        inner = Tokenizer.from_str(text)
    except Exception as error:
        raise DataError(f"{where} is not a tokenizer.json ({error}); replace it.") from None
    return TextTokenizer(inner, eos_token, where)
