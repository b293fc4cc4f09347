"""A cable between this network namespace and another: how slow, how lossy and when cut, the test says.

Two TUN devices, and a thread that carries IP packets between them: both ends see real TCP over a bad line. It needs no
`tc netem`, which many kernels lack.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Addresses of the two ends; the near one is in the namespace of the caller.
NEAR, FAR = "10.77.0.1", "10.77.0.2"
_CLONE_NEWNET, _TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x40000000, 0x400454CA, 0x0001, 0x1000
_FULL = 2000  # packets on the way in one direction; more are dropped, as by any router


def why_not() -> str:
    """Why no wire can be laid here; "" when it can."""
    if [name for _, name in socket.if_nameindex()] != ["lo"]:
        return "not in a network namespace of its own: run `make drill`"
    try:
        os.close(_device("probe"))
    except OSError as error:
        return f"no TUN device: {error}"
    return ""


class Wire:
    """delay: seconds, loss: share of packets that vanish, rate: bytes per second; each in either direction."""

    def __init__(self) -> None:
        self.delay, self.loss, self.rate = 0.0, 0.0, 1e9
        self.sent, self.lost, self.cuts = 0, 0, 0  # packets from far to near and back; cuts made
        self._cut_after: tuple[int, float] | None = None
        self._cut_until = 0.0
        self._random = random.Random(0)
        self._open = True
        self._devices = [_device("near", NEAR, FAR)]
        far = threading.Thread(target=self._lay_far_end)
        far.start()
        far.join()
        self._carrier = threading.Thread(target=self._carry, daemon=True)
        self._carrier.start()

    def enter(self) -> list[str]:
        """The beginning of a command that runs at the far end."""
        return ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self._namespace}"]

    def cut_in_transfer(self, after: int, seconds: float) -> None:
        """Let nothing pass for `seconds` once `after` more bytes went from the far end to the near one."""
        self._cut_after = (after, seconds)

    def close(self) -> None:
        self._open = False
        self._carrier.join()
        for handle in [*self._devices, self._namespace]:
            os.close(handle)

    def _lay_far_end(self) -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:  # of this thread only
            raise OSError(ctypes.get_errno(), "unshare")
        self._namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        self._devices.append(_device("far", FAR, NEAR))

    def _carry(self) -> None:
        on_the_way: list[tuple[float, int, int, bytes]] = []
        free = [0.0, 0.0]
        number = 0
        while self._open:
            ready, _, _ = select.select(self._devices, [], [], 0.002 if on_the_way else 0.05)
            now = time.monotonic()
            for source in ready:
                packet, end = os.read(source, 65536), self._devices.index(source)
                if self._lets_pass(packet, end, now) and len(on_the_way) < _FULL:
                    free[end] = max(free[end], now) + len(packet) / self.rate
                    number += 1
                    heapq.heappush(on_the_way, (free[end] + self.delay, number, 1 - end, packet))
            while on_the_way and on_the_way[0][0] <= now:
                _, _, end, packet = heapq.heappop(on_the_way)
                os.write(self._devices[end], packet)

    def _lets_pass(self, packet: bytes, end: int, now: float) -> bool:
        self.sent += 1
        if end == 1 and self._cut_after:
            left, seconds = self._cut_after
            self._cut_after = (left - len(packet), seconds)
            if left < len(packet):
                self._cut_after, self._cut_until = None, now + seconds
                self.cuts += 1
        passes = now >= self._cut_until and self._random.random() >= self.loss
        self.lost += not passes
        return passes


@contextmanager
def wire() -> Iterator[Wire]:
    laid = Wire()
    try:
        yield laid
    finally:
        laid.close()


def _device(name: str, address: str = "", peer: str = "") -> int:
    """A TUN device of this thread's namespace, with its addresses; it lasts as long as the handle is open."""
    handle = os.open("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
        if address:
            subprocess.run(["ip", "addr", "add", address, "peer", peer, "dev", name], check=True)
            subprocess.run(["ip", "link", "set", name, "up"], check=True)
    except BaseException:
        os.close(handle)
        raise
    return handle
