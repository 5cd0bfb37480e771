"""What the algorithm files share."""
import os
from datetime import timedelta
from pathlib import Path

import huggingface_hub as hub
from huggingface_hub.errors import HFValidationError

TIMEOUT = timedelta(hours=2)  # of collectives: a rank may sample or verify longer than another


def require(condition: object, message: str) -> None:
    """A user's mistake: end with one line that names the remedy."""
    if not condition:
        raise SystemExit(f"error: {message}")


def check_hub(flag: str, name: str, kind: str, cached: str | Path | None) -> None:
    """End in one line if the hub has no model or dataset `name`. That takes one request; the
    libraries that load it try six times in half a minute.

    cached: where this machine may have it.
    """
    if hub.is_offline_mode() or (cached and os.path.exists(cached)):
        return  # the libraries find it, or say why they do not, without the hub
    try:
        there = hub.repo_exists(name, repo_type=kind)
    except HFValidationError:
        there = False
    except Exception as error:  # its class belongs to the client's HTTP library, which changes
        why = (str(error).strip() or repr(error)).splitlines()[0]
        raise SystemExit(f"error: {flag} {name}: no folder, nor in the cache, and the hub cannot "
                         f"be reached ({why})") from None
    require(there, f"{flag} {name}: no folder, nor on the hub; look for a typing error (a private "
            f"{kind} needs `hf auth login`)")
