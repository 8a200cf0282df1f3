"""A producer thread with a bounded queue, which makes a few items ahead of their use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

Item = TypeVar("Item")
POLL = 0.1
"""Seconds between two checks of a blocked producer whether its consumer has left."""
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
    """Yields the items of ``source``, which runs on a thread called ``name``, at most ``ahead`` items in advance.

    ``source`` is called with a function that raises Stopped once the consumer has left; long work between two items
    should call it.  Errors of the source are raised in the consumer.  ``waiting`` is called every ASK seconds while
    the consumer waits for an item; an exception from it ends the iteration.  Closing the iterator ends the thread.
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
        except BaseException as error:  # raised again in the consumer
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
