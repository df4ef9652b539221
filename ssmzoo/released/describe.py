"""What a file of weights is: family, constructor arguments that the tensors tell, wrapper, and what lies beside."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ssmzoo.released.config_json import arguments_of, family_of_config, read_config
from ssmzoo.released.family import family_of, find, foreign
from ssmzoo.released.files import WRAPPERS, CheckpointError, read_weight_file
from ssmzoo.released.infer import join


def describe(path: str | Path) -> list[str]:
    """Lines for a person: what `load_official(path)` would load. Raises CheckpointError for what cannot be read."""
    path = Path(path).expanduser()
    config = read_config(path)
    file = read_weight_file(path)
    family = family_of_config(config) or family_of(file.state)
    if family and (wrappers := find(family, "WRAPPERS")):
        file = read_weight_file(path, wrappers)
    state = file.state
    types = Counter({str(v.dtype).removeprefix("torch."): 0 for v in state.values()})
    for value in state.values():
        types[str(value.dtype).removeprefix("torch.")] += value.numel()
    lines = [
        f"{path}: {family or 'of no family that is known here'}",
        f"tensors      {len(state):,} with {sum(types.values()):,} values ({', '.join(types)})",
    ]
    if file.wrapper:
        others = [key for key in file.beside if key in WRAPPERS]
        more = f"; the file also holds {', '.join(others)}" if others else ""
        lines.append(f"taken from   {file.wrapper}{more}")
    if rest := [f"{key} {value!r:.60}" for key, value in file.beside.items() if key not in WRAPPERS]:
        lines.append(f"beside       {', '.join(rest[:6])}")
    if family is None:
        guess = [f"perhaps      {words}"] if (words := foreign(state)) else []
        return [*lines, f"keys         {', '.join(list(state)[:6])}", *guess]
    names = [name for table in find(family, "TABLES") or () for name in table.names]
    try:
        inferred = join(family, state, arguments_of(family, config, names or None))
    except CheckpointError as error:
        return [*lines, f"arguments    {error}"]
    return [
        *lines,
        *(f"  {name:<22} {value}" for name, value in inferred.items()),
        f"load with    {call(family, path)}",
    ]


def call(family: str, path: Path) -> str:
    return f"ssmzoo.load_official({family!r}, {str(path)!r})"
