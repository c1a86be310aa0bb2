"""Where a domain's documents come from: files of text, rows, chats or token ids, here or in an object store.

================  ==============================================================================
by name           what it holds
================  ==============================================================================
``.jsonl``        one JSON object a line; also ``.ndjson``, and ``.json`` with a compression below
``….gz .zst``     the same, compressed
``.parquet``      rows
``.arrow``        rows, as ``save_to_disk`` of Hugging Face datasets writes them
``.idx .bin``     token ids of Megatron-LM, a pair of files
``.npy``          token ids, with numpy's header or without
``.bin .raw``     token ids without a header
``index.json``    a folder of MDS shards: text, or token ids
any other         one document of UTF-8 text
================  ==============================================================================
"""

from opmix_dist.data.sources.files import FileSource, files_fingerprint, parse_domains
from opmix_dist.data.sources.tokens import TokenDType

__all__ = ["FileSource", "TokenDType", "files_fingerprint", "parse_domains"]
