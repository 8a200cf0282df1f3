"""A bounded producer thread: items are made ahead of their use, a few at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

Item = TypeVar("Item")
POLL = 0.1
"""Seconds after which a waiting producer looks whether anybody still wants its items."""
ASK = 0.5
"""Seconds between two calls of ``waiting``."""


class Stopped(Exception):
    """Raised inside a producer when its consumer has left."""


def produced(
    source: Callable[[Callable[[], None]], Iterator[Item]],
    ahead: int,
    name: str,
    waiting: Callable[[], object] = lambda: None,
) -> Generator[Item, None, None]:
    """The items of ``source``, taken on a thread called ``name``, at most ``ahead`` of them early.

    ``source`` is called on that thread with a function that raises Stopped once nobody wants its items; long work
    between two items calls it.  Errors of the source are raised where the items are used.  ``waiting`` is called
    every ASK seconds while none comes; what it raises ends the iteration.  Closing the iterator ends the thread.
    """
    ready: queue.Queue[tuple[bool, Item | BaseException | None]] = queue.Queue(ahead)
    stop = threading.Event()

    def put(is_item: bool, item: Item | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put((is_item, item), timeout=POLL)
            except queue.Full:
                continue

    def check() -> None:
        if stop.is_set():
            raise Stopped

    def run() -> None:
        try:
            for item in source(check):
                put(True, item)
                if stop.is_set():
                    return
            put(False, None)
        except BaseException as error:  # raised again where the items are used
            put(False, error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        while True:
            try:
                is_item, item = ready.get(timeout=ASK)
            except queue.Empty:
                waiting()
                continue
            if is_item:
                yield item  # type: ignore[misc]
            elif item is None:
                return
            else:
                assert isinstance(item, BaseException)
                raise item
    finally:
        stop.set()
        thread.join()
