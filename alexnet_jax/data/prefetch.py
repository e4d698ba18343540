"""Call a function ahead of its consumer, in threads."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar('T')


def prefetch(
    fn: Callable[[int], T], start: int, stop: int, depth: int = 2, threads: int = 1
) -> Generator[T]:
    """Yield fn(start), ..., fn(stop - 1), while threads work up to `depth` calls ahead.

    An exception in fn(i) is raised where fn(i) would have been yielded. Closing the generator (or
    dropping it) waits for the calls in flight and ends the threads.
    """
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix='prefetch')
    try:
        ahead = deque(pool.submit(fn, i) for i in range(start, min(start + depth, stop)))
        for i in range(start, stop):
            result = ahead.popleft().result()
            if i + depth < stop:
                ahead.append(pool.submit(fn, i + depth))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
