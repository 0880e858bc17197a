"""Values that break things, and random choices among them."""

import numpy as np

NUMBERS = [0, 1, -1, 2, 3, 7, 63, 64, 255, 1000, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, -(2**63), 10**9, 10**12, 10**30]
FRACTIONS = [0.0, -0.0, 0.5, 1.5, -1.0, 1e-300, 1e30, 1e308, float("nan"), float("inf"), float("-inf")]
TEXTS = [
    "",
    " ",
    "x",
    "*",
    "/",
    "a/b",
    "B",
    "NK",
    "nan",
    "1",
    "0",
    "\0",
    "a\0b",
    "\ud800",
    "é",
    "😀",
    "\u202e",
    "_index",
    "mix",
]
TEXTS += [
    "../../etc/passwd",
    "/etc/passwd",
    "<script>alert(1)</script>",
    "{{7*7}}",
    "x" * 5000,
    "line\nbreak",
    "NK=",
    "NaN",
]


class Dice:
    """Random choices of one input."""

    def __init__(self, seed, number):
        self.rng = np.random.default_rng([seed, number])

    def below(self, n):
        return int(self.rng.integers(n))

    def chance(self, share):
        return self.rng.random() < share

    def of(self, choices):
        choices = list(choices)
        return choices[self.below(len(choices))]

    def number(self):
        return self.of(NUMBERS if self.chance(0.6) else FRACTIONS)

    def text(self):
        return self.of(TEXTS)

    def value(self, depth=0):
        """Return a value of JSON, mostly a wrong one."""
        kind = self.below(9)
        if kind < 4:
            return self.number()
        if kind < 6:
            return self.text()
        if kind == 6:
            return self.of([None, True, False])
        if depth > 2:
            return []
        if kind == 7:
            return [self.value(depth + 1) for _ in range(self.below(4))]
        return {
            self.of(["values", "codes", "x", "minutes", "layer", ""]): self.value(depth + 1)
            for _ in range(self.below(3))
        }

    def bytes(self, content):
        """Return a content with bytes flipped, cut, overwritten or moved."""
        data = bytearray(content)
        if not data:
            return bytes(self.rng.integers(0, 256, 20, dtype=np.uint8))
        for _ in range(1 + self.below(4)):
            kind, at = self.below(7), self.below(len(data))
            size = int(2 ** self.below(9))
            if kind < 3:
                data[at] ^= 1 << self.below(8)
            elif kind == 3:
                data[at : at + size] = self.of([b"\0", b"\xff"]) * len(data[at : at + size])
            elif kind == 4:
                where = self.below(len(data))
                data[at : at + size] = data[where : where + len(data[at : at + size])]
            elif kind == 5 and self.chance(0.3):
                del data[at:]
            elif kind == 6:
                data[at : at + 8] = int(self.of(NUMBERS[:-1]) % 2**64).to_bytes(8, "little")[: len(data[at : at + 8])]
            if not data:
                break
        return bytes(data)
