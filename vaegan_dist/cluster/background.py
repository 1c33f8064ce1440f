"""Work beside the main thread, for as long as a block lasts."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def background(name: str, look: Callable[[], None], seconds: float, *, once_more: bool = False) -> Iterator[None]:
    """Within the block, a thread calls `look` every `seconds`; after it the thread is gone.

    Args:
        once_more: look a last time when the block has ended.
    """
    ending = threading.Event()

    def loop() -> None:
        while not ending.wait(seconds):
            look()
        if once_more:
            look()

    thread = threading.Thread(target=loop, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()
