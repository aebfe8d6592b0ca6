"""Hashes of a prompt's blocks, as the workers' prefix caches have them."""

from types import SimpleNamespace
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    generate_block_hash_extra_keys,
    hash_block_tokens,
    init_none_hash,
)
from vllm.v1.engine import EngineCoreRequest

from scheduler.prefix_index import HASH_BYTES, block_size_of
from workers.engine.vllm_prefix import prefix_format

MAX_BLOCKS = 4096
"""Blocks of a prompt that are hashed, in 32 KiB; what follows them hardly matters for placement."""


class PrefixHashes:
    """Hashes prompts as vLLM does; the workers' blocks may have another size than the config says,
    which is what a platform or an attention backend made of it."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._config = vllm_config
        self._hash = get_hash_fn_by_name(vllm_config.cache_config.prefix_caching_hash_algo)
        init_none_hash(self._hash)  # an engine core does, of which there is none here
        self._set_block_size(vllm_config.cache_config.block_size)

    def _set_block_size(self, block_size: int) -> None:
        self._block_size = block_size
        self.format = prefix_format(self._config, block_size)
        """What the hashes are of."""

    def follow(self, workers_format: str) -> None:
        """Use the block size of a worker's format, if it differs in no more than that."""
        if workers_format == self.format:
            return
        size = block_size_of(workers_format)
        if size and prefix_format(self._config, size) == workers_format:
            self._set_block_size(size)

    def of(self, request: EngineCoreRequest) -> bytes:
        """Hashes of the blocks of a prompt that it may find in a cache; none for images and
        embeddings, and for a prompt that is to be computed whole.

        The last token is always computed: it gives the first output.
        """
        token_ids, sampling = request.prompt_token_ids, request.sampling_params
        if (
            not token_ids
            or request.mm_features
            or request.prompt_embeds is not None
            or (sampling and sampling.skip_reading_prefix_cache)
        ):
            return b""
        size = self._block_size
        num_blocks = min((len(token_ids) - 1) // size, MAX_BLOCKS)
        extra_keys = self._extra_keys(request, 0)
        later_keys = self._extra_keys(request, size)
        hashes = bytearray()
        parent: BlockHash | None = None
        for start in range(0, num_blocks * size, size):
            parent = hash_block_tokens(
                self._hash, parent, token_ids[start : start + size], extra_keys
            )
            hashes += parent[-HASH_BYTES:]
            extra_keys = later_keys
        return bytes(hashes)

    def _extra_keys(self, request: EngineCoreRequest, start: int) -> tuple[Any, ...] | None:
        """What else the hash of a block is of: the cache salt in the first one, the adapter."""
        lora = request.lora_request
        # Pickle writes an object once and then refers to it, so two names that are one object give
        # another hash than a worker's, which decodes each by itself.
        view = SimpleNamespace(
            mm_features=None,
            prompt_embeds=None,
            cache_salt=_copy(request.cache_salt or ""),
            lora_request=lora
            and SimpleNamespace(lora_name=_copy(lora.lora_name), lora_path=_copy(lora.lora_path)),
        )
        keys, _ = generate_block_hash_extra_keys(view, start, start + self._block_size, 0)  # type: ignore[arg-type]
        return keys


def _copy(text: str) -> str:
    return text.encode().decode()
