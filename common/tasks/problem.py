"""What a problem is."""
from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Problem:
    """One question. The student sees `messages`; `answer` and `solution` are privileged."""

    id: str
    messages: list[dict[str, str]]  # in chat form
    answer: str | None = None  # the final answer, as text; None for code
    solution: str | None = None  # a worked solution that ends in the answer
    kind: str = "math"  # who judges: "chain" | "math" | "choice" | "tool" | "code" | "gym"
    meta: dict = field(default_factory=dict)  # what else the judge of this kind needs

    @property
    def place(self) -> str:
        """Where it comes from: the place of its record ("FILE, line 3"), or else its id."""
        return self.meta.get("where", f"problem {self.id}")
