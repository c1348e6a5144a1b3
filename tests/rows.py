"""Where a branch's tokens stand in a pack, worked out apart from `engine.layout.pack`."""

from __future__ import annotations

from engine.layout import Encode, Layout


def branch_rows(layout: Layout, encode: Encode) -> dict[str, list[int]]:
    """Branch name -> the packed rows of all its tokens, read from left to right, shared ones included."""
    stored: dict[tuple[int, ...], range] = {}
    end = 0
    branches = {}
    for name, segments in layout.branches.items():
        rows: list[int] = []
        path: tuple[int, ...] = (name in layout.flat,)
        for segment in segments:
            path += (id(segment),)
            if path not in stored:
                stored[path] = range(end, end + len(encode(segment).ids))
                end = stored[path].stop
            rows += stored[path]
        branches[name] = rows
    return branches


def only(layout: Layout, *names: str) -> Layout:
    """The same sample with these branches alone (a separate pass, rather than a packed one), and what is read off them."""
    branches = {name: layout.branches[name] for name in names}
    kept = {id(segment) for path in branches.values() for segment in path}
    readings = tuple(r for r in layout.readings if all(id(segment) in kept for segment, _ in r.holes))
    return Layout(branches, layout.flat, readings)
