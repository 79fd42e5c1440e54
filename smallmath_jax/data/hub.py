"""Whether the Hugging Face hub can be reached, asked once before a set is loaded.

Its own clients try for half a minute a file where there is no network; the person waiting should know in seconds.
"""

import contextlib
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator

PATIENCE_S = 4.0


def reachable(endpoint: str, patience_s: float = PATIENCE_S) -> bool:
    """Whether a connection to `endpoint` (an https address), or to the proxy in front of it, opens in time."""
    target = urllib.parse.urlsplit(endpoint)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(target.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(target.netloc):
        target = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = target.port or {"http": 80, "https": 443}.get(target.scheme, 1080)
    opened = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((target.hostname, port), timeout=patience_s).close()
            opened.set()

    # In a thread: a name server that does not answer holds a connection longer than its timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(patience_s)
    return opened.is_set()


@contextlib.contextmanager
def from_cache() -> Iterator[None]:
    """While it lasts, `datasets` and `huggingface_hub` look into their caches only."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
