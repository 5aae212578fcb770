"""The table of ``benchmarks/results/README.md``, from the files beside it: ``python -m
benchmarks.collect``."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "results"
BEGIN, END = "<!-- table -->\n", "<!-- end -->\n"
APPLE = ("M1", "M2", "M3", "M4", "M5")
COLUMNS = [("step", 512), ("step", 1024), ("decode", 512), ("decode", 1024), ("picture", None)]
NOBODY = "nobody has measured one yet"


def seconds(row: dict | None) -> str:
    return f"{row['seconds']['median']:.3g}" if row and "seconds" in row else ""


def rows_of(document: dict) -> list[list[str]]:
    """Cells of a file: one row for each width and number of bits."""
    out = []
    machine, rows = document["machine"], document["rows"]
    drawn = [row for row in rows if "bits" in row]
    for variant, bits in dict.fromkeys((row["variant"], row["bits"]) for row in drawn):
        own = [row for row in drawn if (row["variant"], row["bits"]) == (variant, bits)]

        def find(what: str, size: int | None, own=own) -> dict | None:
            return next((r for r in own if r["what"] == what and size in (None, r["size"])), None)

        step = find("step", None) or {}
        memory = step.get("memory", {})
        ratio = memory["predicted"] / memory["measured"] if memory else None
        own_size = "" if step.get("size") in (512, 1024) else seconds(step)
        out.append(
            [
                f"{machine['processor']}, {machine['device']}, {machine['dtype']}",
                f"{document['model']}, {variant}, {bits} bits",
                own_size,
                *(seconds(find(what, size)) for what, size in COLUMNS),
                f"{100 * step['share']:.0f} %" if "share" in step else "",
                f"{ratio:.2f}" if ratio else "",
            ]
        )
    return out


def table(documents: list[dict]) -> str:
    head = ["machine", "model", "step at its own size, s"]
    head += [f"{what} at {size}², s" if size else "picture, s" for what, size in COLUMNS]
    head += ["step, of the products' rate", "memory of a step, predicted / measured"]
    lines = [head, ["---"] * len(head)]
    for document in documents:
        lines += rows_of(document)
    processors = " ".join(document["machine"]["processor"] for document in documents)
    for chip in APPLE:
        if chip not in processors:
            lines.append([f"Apple {chip}", NOBODY, *[""] * (len(head) - 2)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main():
    documents = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    page = FOLDER / "README.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(before + BEGIN + table(documents) + END + after)
    print(table(documents), end="")


if __name__ == "__main__":
    main()
