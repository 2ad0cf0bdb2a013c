"""The bytes of a single token.

Decoding one token alone is lossy: SentencePiece tokenizers drop the leading space, and a token may be a part of a
UTF-8 character. Log-probability listings must show each token as it is, so this reads the vocabulary entry itself, in
the two alphabets in use: byte-level BPE (one printable character per byte) and SentencePiece ("▁" for a space,
"<0xE2>" for a raw byte).
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

TokenBytes = Callable[[int], bytes]
_RAW_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@lru_cache(maxsize=1)
def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level BPE.

    Printable Latin-1 stands for itself; the other bytes sit at 256 and up, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def token_bytes_of(tokenizer: Any) -> TokenBytes:
    """A function from token id to the bytes that token stands for; special and added tokens stand for their name."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    byte_level = backend is not None and "ByteLevel" in str(backend.decoder)
    added = {int(token_id): str(content) for content, token_id in tokenizer.get_added_vocab().items()}
    alphabet = _byte_level_alphabet()

    def token_bytes(token_id: int) -> bytes:
        piece = added.get(token_id)
        if piece is not None:
            return piece.encode()
        piece = tokenizer.convert_ids_to_tokens(token_id)
        # Rows that pad the embedding to a round size have no entry in the vocabulary.
        if piece is None:
            return b""
        if byte_level and all(character in alphabet for character in piece):
            return bytes(alphabet[character] for character in piece)
        if raw := _RAW_BYTE.fullmatch(piece):
            return bytes([int(raw[1], 16)])
        return str(piece).replace("▁", " ").encode()

    return token_bytes


def shown(token: bytes) -> str:
    """`token` as OpenAI names it: its text, or "bytes:\\xe2\\x96" when it is not whole UTF-8."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
