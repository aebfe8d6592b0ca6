"""The chunks of streamed answers, as they reach a client handle."""

import asyncio
from collections.abc import Mapping

import msgspec
from ray.util import get_node_ip_address

from cluster.ingress.protocol import Chunk
from workers import sockets
from workers.token_stream import StreamAddress, StreamReceiver

_decode_chunks = msgspec.msgpack.Decoder(list[Chunk]).decode


class ChunkReceiver:
    """Gives each chunk to its call; used in one event loop, from the first streamed call on."""

    def __init__(self, ports: sockets.Ports | None = None) -> None:
        """Listen at one of `ports`, by default at any that is free."""
        self._ports = ports
        self._chunks: dict[str, asyncio.Queue[str]] = {}
        self._address: StreamAddress | None = None
        self._receiving: asyncio.Task[None] | None = None

    def open(self, call_id: str, chunks: asyncio.Queue[str]) -> StreamAddress:
        """Put the chunks of a call into `chunks`; returns where they are to be sent."""
        if self._address is None:
            receiver = StreamReceiver(get_node_ip_address(), self._ports)
            self._address = receiver.address
            self._receiving = asyncio.create_task(_receive(receiver, self._chunks))
        self._chunks[call_id] = chunks
        return self._address

    def close(self, call_id: str) -> None:
        """Forget a call."""
        self._chunks.pop(call_id, None)


async def _receive(receiver: StreamReceiver, chunks: Mapping[str, asyncio.Queue[str]]) -> None:
    """Receive until cancelled. The task knows neither calls nor handle, which may go before it."""
    try:
        while True:
            for frame in await receiver.receive():
                try:
                    received = _decode_chunks(frame)
                except sockets.UNREADABLE as error:
                    receiver.dropped.add(error)
                    continue
                for chunk in received:
                    if chunk.call_id in chunks:
                        chunks[chunk.call_id].put_nowait(chunk.data)
    finally:
        receiver.close()
