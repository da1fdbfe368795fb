"""What of a file could not be decoded, and how much sound that was. All times are in seconds."""


class Usual:
    """How much sound the packets hold for their size: one that is much too large contains several."""

    def __init__(self) -> None:
        self._bytes, self._seconds = 0, 0.0

    def add(self, size: int, seconds: float) -> None:
        self._bytes, self._seconds = self._bytes + size, self._seconds + seconds

    def excess(self, size: int, seconds: float) -> float:
        """Return how many seconds more than `seconds` a packet of that size holds."""
        return max(0.0, size * self._seconds / self._bytes - seconds) if self._bytes else 0.0


class Damage:
    """What of a file could not be decoded: a number of parts, their seconds, and why it ends too early, if it does."""

    def __init__(self) -> None:
        self.parts, self._seconds, self._end = 0, 0.0, ""

    def add(self, seconds: float) -> None:
        self.parts, self._seconds = self.parts + 1, self._seconds + seconds

    def breaks_off(self, why: str) -> None:
        """The first reason counts: others follow from it."""
        self._end = self._end or why

    def __str__(self) -> str:
        parts = f"{self.parts} parts" if self.parts > 1 else "one part"
        lost = f"{max(self._seconds, 0.1):.1f} s in {parts} could not be decoded" if self.parts else ""
        return "; ".join(filter(None, (lost, self._end)))
