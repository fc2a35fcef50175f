"""The map of the package: its rooms and which of them import which, drawn as docs/rooms.svg.

A room is a package or module on the first level of `megatron_rl`. An arrow goes from a room to a room that it imports,
always to a lower floor. An arrow that follows from others is not drawn: with a -> b -> c, a -> c is left out. Floors
are the layers of the import-linter contract in pyproject.toml, in its order. Neighboring layers with no import between
them share a floor. Rooms of one layer that import each other, and all rooms where no contract exists, are placed by the
longest chain of imports below them. Sizes are lines of Python, rounded to two digits, so that the map does not change
with every line.

    python benchmarks/rooms.py [--check]
"""

import argparse
import ast
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from graphlib import TopologicalSorter
from itertools import combinations, pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, TARGET = "megatron_rl", ROOT / "docs" / "rooms.svg"
BOX_WIDTH, BOX_HEIGHT, GAP, LANE, FLOOR_HEIGHT, MARGIN = 132, 44, 22, 12, 96, 30
SWEEPS = 60
STYLE = """
    .back { fill: #ffffff; stroke: #d5dae1 } .room { fill: #eef4fb; stroke: #2563a8 }
    .name { fill: #1c2733; font-weight: 600 } .size { fill: #56616f; font-size: 11px }
    .arrow { fill: none; stroke: #7b8696; stroke-width: 1.2 } .tip { fill: #7b8696 }
    @media (prefers-color-scheme: dark) {
      .back { fill: #12171d; stroke: #36404c } .room { fill: #1b2a3d; stroke: #6ea6e8 }
      .name { fill: #e8edf3 } .size { fill: #a3aebb } .arrow { stroke: #8b97a6 } .tip { fill: #8b97a6 }
    }"""

Graph = dict[str, set[str]]


# Rooms and arrows ----------------------------------------------------------------------------------------------


def read_package(package: Path) -> tuple[dict[str, int], Graph]:
    """Return the lines of every room, and the rooms that it imports."""
    lines: dict[str, int] = {}
    below: Graph = {}
    for file in sorted(package.rglob("*.py")):
        room = file.relative_to(package).with_suffix("").parts[0]
        if room == "__init__":  # of the package itself: its version
            continue
        text = file.read_text(encoding="utf-8")
        lines[room] = lines.get(room, 0) + len(text.splitlines())
        below.setdefault(room, set()).update(set(imported(ast.parse(text))) - {room})
    return lines, {room: found & set(lines) for room, found in below.items()}


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the rooms that a file imports, anywhere in it and also by name through importlib."""
    loaders = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and f"import_module(f'{PACKAGE}." in ast.unparse(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in loaders:
            names = [
                f"{PACKAGE}.{one.value}"
                for one in node.args
                if isinstance(one, ast.Constant) and isinstance(one.value, str)
            ]
        yield from (name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}."))


def contract_layers() -> dict[str, int]:
    """Return the layer of each room in the import-linter contract, 0 being the lowest; empty without a contract."""
    tree = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = tree.get("tool", {}).get("importlinter", {}).get("contracts", [])
    layers: list[str] = next((one["layers"] for one in contracts if one.get("type") == "layers"), [])
    found: dict[str, int] = {}
    for number, layer in enumerate(reversed(layers)):
        for name in layer.replace("|", ":").split(":"):
            found[name.strip(" ()").removeprefix(f"{PACKAGE}.").partition(".")[0]] = number
    return found


def floors(below: Graph) -> list[list[str]]:
    """Return the rooms of every floor, the highest first. Raises SystemExit when an import goes up.

    A room that the contract does not name is in the layer of the highest room that it imports.
    """
    contract = contract_layers()
    layer: dict[str, int] = {}
    depth: dict[str, int] = {}
    for room in TopologicalSorter(below).static_order():
        layer[room] = contract.get(room, max((layer[other] for other in below[room]), default=0))
        wrong = sorted(other for other in below[room] if layer[other] > layer[room])
        if wrong:
            raise SystemExit(f"{room} imports {', '.join(wrong)}, on a higher floor of the contract in pyproject.toml")
        depth[room] = 1 + max((depth[other] for other in below[room] if layer[other] == layer[room]), default=-1)
    rows: list[list[str]] = [[]]
    for place in sorted({(layer[room], depth[room]) for room in below}, reverse=True):
        row = [room for room in below if (layer[room], depth[room]) == place]
        if any(below[room] & set(row) for room in rows[-1]):
            rows.append([])
        rows[-1] = sorted(rows[-1] + row)
    return rows


def reduced(below: Graph) -> Graph:
    """Return the graph without the arrows that follow from others."""
    reach: Graph = {}
    for room in TopologicalSorter(below).static_order():
        reach[room] = below[room].union(*(reach[other] for other in below[room]))
    return {room: {a for a in found if not any(a in reach[b] for b in found)} for room, found in below.items()}


# Layout --------------------------------------------------------------------------------------------------------


def with_lanes(rows: list[list[str]], below: Graph) -> tuple[list[list[str]], dict[tuple[str, str], list[str]]]:
    """Add a lane on every floor that an arrow passes. Returns the rows, and for each arrow the nodes on its way."""
    floor = {room: at for at, row in enumerate(rows) for room in row}
    rows = [list(row) for row in rows]
    ways: dict[tuple[str, str], list[str]] = {}
    for room in sorted(below):
        for other in sorted(below[room]):
            lanes = [f"{room}>{other}@{at}" for at in range(floor[room] + 1, floor[other])]
            for at, lane in enumerate(lanes, floor[room] + 1):
                rows[at].append(lane)
            ways[room, other] = [room, *lanes, other]
    return rows, ways


def width(node: str) -> float:
    return LANE if ">" in node else BOX_WIDTH


def spread(row: Sequence[str], wish: Mapping[str, float]) -> dict[str, float]:
    """Return centers as near to the wishes as the order and the widths of a row allow (least squares)."""
    offsets, at = [], 0.0
    for before, node in pairwise(["", *row]):
        at += (width(before) + width(node)) / 2 + GAP if before else 0.0
        offsets.append(at)
    blocks: list[tuple[float, int]] = []  # mean of wish minus offset, members
    for node, offset in zip(row, offsets, strict=True):
        blocks.append((wish[node] - offset, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (b, m), (a, n) = blocks.pop(), blocks.pop()
            blocks.append(((a * n + b * m) / (n + m), n + m))
    means = [mean for mean, count in blocks for _ in range(count)]
    return {node: mean + offset for node, mean, offset in zip(row, means, offsets, strict=True)}


def place(rows: list[list[str]], ways: Mapping[tuple[str, str], list[str]]) -> dict[str, float]:
    """Return the horizontal center of every node.

    Sweeps down and up move each node to the mean of its neighbors. The sweep with the fewest crossings is taken.
    """
    floor = {node: at for at, row in enumerate(rows) for node in row}
    links: list[list[tuple[str, str]]] = [[] for _ in rows]  # from each floor to the next
    for a, b in sorted({link for way in ways.values() for link in pairwise(way)}):
        links[floor[a]].append((a, b))
    x = {node: center for row in rows for node, center in spread(row, dict.fromkeys(row, 0.0)).items()}
    best, least = x, float("inf")
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for at in range(1, len(rows)) if down else reversed(range(len(rows) - 1)):
            near: dict[str, list[float]] = {node: [] for node in rows[at]}
            for a, b in links[at - 1] if down else links[at]:
                near[b if down else a].append(x[a if down else b])
            wish = {node: sum(found) / len(found) if found else x[node] for node, found in near.items()}
            x = x | spread(sorted(rows[at], key=lambda node: (wish[node], node)), wish)
        crossings = sum((x[a] - x[c]) * (x[b] - x[d]) < 0 for row in links for (a, b), (c, d) in combinations(row, 2))
        cost = crossings + sum(abs(x[a] - x[b]) for row in links for a, b in row) / 2000
        if cost < least:
            best, least = x, cost
    return best


# Drawing -------------------------------------------------------------------------------------------------------


def draw(lines: Mapping[str, int], below: Graph) -> str:
    """Return the map as SVG."""
    rows = floors(below)
    full, ways = with_lanes(rows, reduced(below))
    x = place(full, ways)
    left = min(x[node] - width(node) / 2 for node in x) - MARGIN
    x = {node: center - left for node, center in x.items()}
    y = {node: MARGIN + at * FLOOR_HEIGHT for at, row in enumerate(full) for node in row}
    wide = round(max(x[node] + width(node) / 2 for node in x) + MARGIN)
    high = 2 * MARGIN + (len(rows) - 1) * FLOOR_HEIGHT + BOX_HEIGHT
    font = "font-family=\"-apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif\""
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}"',
        f'     role="img" aria-labelledby="title desc" text-anchor="middle" font-size="14" {font}>',
        f'  <title id="title">The rooms of {PACKAGE}</title>',
        '  <desc id="desc">From the highest floor to the lowest, each room with all rooms that it imports.',
        *(f"    {room}: {', '.join(sorted(below[room])) or 'none'}." for row in rows for room in row),
        "  </desc>",
        f"  <style>{STYLE}\n  </style>",
        "  <defs>",
        '    <marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">',
        '      <path class="tip" d="M0,1 L9,5 L0,9 z"/>',
        "    </marker>",
        "  </defs>",
        f'  <rect class="back" x="1" y="1" width="{wide - 2}" height="{high - 2}" rx="14"/>',
    ]
    for way in ways.values():
        path = f"M{x[way[0]]:.1f},{y[way[0]]}"
        for a, b in pairwise(way):
            start, end, bend = y[a] + BOX_HEIGHT, y[b], (FLOOR_HEIGHT - BOX_HEIGHT) // 2
            path += f" V{start} C{x[a]:.1f},{start + bend} {x[b]:.1f},{end - bend} {x[b]:.1f},{end}"
        out.append(f'  <path class="arrow" marker-end="url(#tip)" d="{path}"/>')
    for room in (room for row in rows for room in row):
        corner = f'x="{x[room] - BOX_WIDTH / 2:.1f}" y="{y[room]}"'
        out += [
            f'  <rect class="room" {corner} width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8"/>',
            f'  <text class="name" x="{x[room]:.1f}" y="{y[room] + 19}">{room}</text>',
            f'  <text class="size" x="{x[room]:.1f}" y="{y[room] + 35}">{rounded(lines[room]):,} lines</text>',
        ]
    return "\n".join([*out, "</svg>", ""])


def rounded(lines: int) -> int:
    """Return the number rounded to two digits."""
    return round(lines, 2 - len(str(lines)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="only compare; exit code 1 if docs/rooms.svg is out of date"
    )
    args = parser.parse_args()
    lines, below = read_package(ROOT / PACKAGE)
    text, name = draw(lines, below), TARGET.relative_to(ROOT)
    if args.check:
        if not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != text:
            sys.exit(f"{name} is out of date: run python benchmarks/rooms.py")
        return
    TARGET.write_text(text, encoding="utf-8")
    arrows = sum(map(len, below.values()))
    print(f"{name}: {len(lines)} rooms on {len(floors(below))} floors, {arrows} imports between rooms")


if __name__ == "__main__":
    main()
