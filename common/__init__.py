"""What the algorithm files share."""
import os
from pathlib import Path

import huggingface_hub as hub
from huggingface_hub.errors import HFValidationError


def require(condition: object, message: str) -> None:
    """A user's mistake: end with one line that names the remedy."""
    if not condition:
        raise SystemExit(f"error: {message}")


def check_hub(flag: str, name: str, kind: str, cached: str | Path | None) -> None:
    """Whether the hub has the model or dataset `name`, in one request: the libraries that load it try
    six times in half a minute. cached: where it lies on this machine, if it does."""
    if hub.is_offline_mode() or (cached and os.path.exists(cached)):
        return  # the libraries find it, or say why they do not, without the hub
    try:
        there = hub.repo_exists(name, repo_type=kind)
    except HFValidationError:
        there = False
    except Exception as error:  # the class is that of the client's HTTP library, which changes
        raise SystemExit(f"error: {flag} {name}: no folder, nor in the cache, and the hub cannot be "
                         f"reached ({str(error).strip().splitlines()[0]})") from None
    require(there, f"{flag} {name}: no folder, nor on the hub; look for a typing error (a private "
            f"{kind} needs `hf auth login`)")
