"""A cable between two network links that delays each frame, and loses some: a program.

    python -m tests.nodes.relay LINK LINK DELAY_S LOSS

It does what netem does, for kernels without it. It ends when it is killed.
"""

import heapq
import random
import select
import socket
import sys
import time

SOL_PACKET, PACKET_IGNORE_OUTGOING = 263, 23
ETH_P_ALL = 3
MAX_FRAME_BYTES = 65536
BUFFER_BYTES = 8 << 20


def main() -> None:
    """Carry frames for ever."""
    first, second, delay_s, loss = sys.argv[1:]
    carry(_open(first), _open(second), float(delay_s), float(loss))


def carry(a: socket.socket, b: socket.socket, delay_s: float, loss: float) -> None:
    """Carry each frame to the other side `delay_s` later, except for a share of `loss`."""
    chance = random.Random(0)
    other = {a: b, b: a}
    due: list[tuple[float, int, socket.socket, bytes]] = []
    number = 0
    print("ready", flush=True)
    while True:
        wait_s = max(0.0, due[0][0] - time.monotonic()) if due else None
        for side in select.select([a, b], [], [], wait_s)[0]:
            frame = side.recv(MAX_FRAME_BYTES)
            if chance.random() >= loss:
                number += 1
                heapq.heappush(due, (time.monotonic() + delay_s, number, other[side], frame))
        while due and due[0][0] <= time.monotonic():
            _, _, to, frame = heapq.heappop(due)
            to.send(frame)


def _open(link: str) -> socket.socket:
    """All frames that arrive at a link, not those that are sent there."""
    side = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    side.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    side.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    side.bind((link, ETH_P_ALL))
    return side


if __name__ == "__main__":
    main()
