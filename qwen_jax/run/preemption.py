"""Google Compute Engine's announcement of a pre-emption, written to the log.

It is only a word ahead of SIGTERM, which ends the worker (shutdown.py). The notice can be absent, late or
wrong, so nothing depends on it: work that is under way is committed as it would be without it.
Source: the VM's metadata server, `instance/preempted`.
"""

import http.client
import logging
import os
import threading
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

log = logging.getLogger(__name__)

_PRODUCT_NAME = Path("/sys/class/dmi/id/product_name")
_LONGEST_WAIT_S = 3600


def watch_for_notice() -> threading.Thread | None:
    """Starts a daemon thread that waits for the notice; None where there is no metadata server.

    There is one on a Compute Engine VM, or where GCE_METADATA_HOST says so.
    """
    host = os.environ.get("GCE_METADATA_HOST") or _metadata_host()
    if host is None:
        return None
    thread = threading.Thread(target=_wait, args=(host,), name="preemption notice", daemon=True)
    thread.start()
    return thread


def _metadata_host() -> str | None:
    try:
        on_compute_engine = "Google" in _PRODUCT_NAME.read_text()
    except OSError:
        return None
    return "metadata.google.internal" if on_compute_engine else None


def _wait(host: str) -> None:
    url = f"http://{host}/computeMetadata/v1/instance/preempted?wait_for_change=true"
    request = Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urlopen(request, timeout=_LONGEST_WAIT_S) as reply:
            announced = reply.read(16).strip() == b"TRUE"
    except (URLError, OSError, http.client.HTTPException) as error:
        log.debug("no pre-emption notice can be had: %s", error)
        return
    if announced:
        log.warning("Compute Engine announces a pre-emption; the next start resumes from the last checkpoint")
