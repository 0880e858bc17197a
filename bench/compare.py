"""Compare two results by their ratios to eager, so that machines of different speed compare.

    python bench/compare.py OLD.json NEW.json

Exit status 0, 1 if a row of ours is more than 10 % worse or gone, 2 if the files cannot be compared.
"""

import sys

from results import read, refuse

WORST = 0.9


def lines_of(old, new):
    """Return (row, old ratio, new ratio, new / old, verdict) for each row of either."""
    before, after = ({row["id"]: row for row in result["rows"]} for result in (old, new))
    for name in dict.fromkeys([*before, *after]):
        row = after.get(name) or before[name]
        first, second = (rows.get(name, {}).get("ratio_to_eager") for rows in (before, after))
        change = second / first if first and second else None
        yield name, first, second, change, verdict(row["ours"], first, second, change)


def verdict(ours, first, second, change):
    if change is None:
        return "gone" if first and ours else "" if first else "new"
    return "WORSE" if ours and change < WORST else ""


def check_comparable(old, new):
    if old["quick"] != new["quick"]:
        refuse("one of the two is a quick run: its sizes are others")
    if not {row["id"] for row in old["rows"]} & {row["id"] for row in new["rows"]}:
        refuse("the two results have no row in common")
    for what in ("threads", "flags", "kernels"):
        if old["machine"][what] != new["machine"][what]:
            print(f"note: {what} differ ({old['machine'][what]}, {new['machine'][what]}): ratios may, too\n")


def main(first, second):
    old, new = read(first), read(second)
    check_comparable(old, new)
    print("| row | old | new | new / old | |\n| --- | --- | --- | --- | --- |")
    bad = False
    for name, *ratios, word in lines_of(old, new):
        print(f"| {name} | {' | '.join('' if r is None else f'{r:.2f}' for r in ratios)} | {word} |")
        bad |= word in ("WORSE", "gone")
    return int(bad)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        refuse("usage: python bench/compare.py OLD.json NEW.json")
    sys.exit(main(*sys.argv[1:]))
