"""What the algorithm files share."""


def require(condition: object, message: str) -> None:
    """A user's mistake: end with one line that names the remedy."""
    if not condition:
        raise SystemExit(f"error: {message}")
