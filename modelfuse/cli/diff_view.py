"""Print the result of ``diff``: findings, tables, and maps of layers × modules, in 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from modelfuse.cli.console import out
from modelfuse.cli.units import abbreviated, counted, duration, rate
from modelfuse.inspection.diff_names import short_names
from modelfuse.inspection.diff_result import Diff, Suggestion, TensorGroup
from modelfuse.printable import one_line

#: Shades of a map from small to large values, and their colours in a 256-colour terminal.
SHADES = "·░▒▓█"
COLOURS = (17, 19, 26, 32, 38, 71, 106, 148, 184, 220, 214, 208)
#: The width without a terminal.
WIDTH = 80
#: The greatest width of module names, and of model names beside numbers.
NAMES, MODELS = 28, 20
#: The most modules in a map.
MOST_ROWS = 24

Measure = Callable[[TensorGroup], float | None]


def show(found: Diff) -> None:
    """Print a comparison."""
    whole = found.whole
    against = "against" if found.base_given else "against the first,"
    out.print(
        "[bold]{}[/] {} [bold]{}[/]: {}, {} elements, in {} ({})",
        counted(len(found.models), "model"), against, found.base,
        counted(whole.tensors, "tensor"), abbreviated(whole.elements),
        duration(found.seconds), rate(found.bytes_read, found.seconds),
    )  # fmt: skip
    out.print("")
    for sentence in found.findings:
        out.print("- {}", sentence)
    advise(found.advice)
    out.print("")
    out.table(("", "model", "‖τ‖/‖b‖", "unchanged", "90 % of ‖τ‖²", "outlying", "NaN, inf"), _models(found))
    if len(found.models) > 1:
        _matrix(found, "interference: how strongly columns act on rows' inputs (1: as the row itself)",
                [[_pair(found, row, column, "interference") for column in range(len(found.models))]
                 for row in range(len(found.models))])  # fmt: skip
        _matrix(found, "cosine of differences; below the diagonal, share of signs that conflict",
                [[_pair(found, row, column, "cosine" if row < column else "sign_conflict")
                  for column in range(len(found.models))] for row in range(len(found.models))])  # fmt: skip
    _map(found, "‖τ‖/‖b‖ by module and layer, root mean square of the models", _distance)
    if len(found.models) > 1:
        _map(found, "largest interference of any pair", _interference)
    for each in found.side_differences:
        out.log("warning" if each.fatal else "note", "{}: {}", short_names(found.models)[each.model], each.text)


def advise(advice: Sequence[Suggestion]) -> None:
    """Print settings that are worth trying."""
    if advice:
        out.print("")
    for each in advice:
        out.print("- worth trying: {}", each.text)
        out.command(each.flags)


def _models(found: Diff) -> Iterator[Sequence[object]]:
    for number, (name, each) in enumerate(zip(short_names(found.models), found.whole.models, strict=True), 1):
        share = [_share(each.unchanged), _share(each.density_90)]
        yield number, _fitted(name, MODELS), _number(each.relative), *share, f"{each.outliers:,}", f"{each.nonfinite:,}"


def _pair(found: Diff, model: int, other: int, name: str) -> str:
    if model == other:
        return "·"
    value = getattr(found.whole.pair(model, other), name)
    return "–" if value is None else f"{value:.2f}".replace("-0.00", "0.00")


def _matrix(found: Diff, title: str, cells: Sequence[Sequence[str]]) -> None:
    """Print a table of models × models; columns have the numbers of the rows."""
    width = max(5, *(len(cell) + 1 for row in cells for cell in row))
    room = max(8, (out.width or WIDTH) - width * len(cells) - 5)
    names = [_fitted(name, min(NAMES, room)) for name in short_names(found.models)]
    beside = max(map(len, names))
    out.print("\n[bold]{}[/]", title)
    out.print("{}", " " * (beside + 4) + "".join(str(number).rjust(width) for number in range(1, len(cells) + 1)),
            wrap=False)  # fmt: skip
    for number, (name, row) in enumerate(zip(names, cells, strict=True), 1):
        line = f"{number:>3} {name.ljust(beside)}" + "".join(cell.rjust(width) for cell in row)
        out.print("{}", line, wrap=False)


def _distance(group: TensorGroup) -> float | None:
    found = [each.relative for each in group.models if each.relative is not None]
    return (sum(each**2 for each in found) / len(found)) ** 0.5 if found else None


def _interference(group: TensorGroup) -> float | None:
    return max((each.interference for each in group.pairs if each.interference is not None), default=None)


def _map(found: Diff, title: str, measure: Measure) -> None:
    """Print a map for each stack of layers: one row per module, one column per layer."""
    for stack in dict.fromkeys(each.stack for each in found.cells if each.layer is not None):
        cells = {(each.module, each.layer): measure(each) for each in found.cells if each.stack == stack}
        layers = [each.layer for each in found.layers if each.stack == stack and each.layer is not None]
        modules = [each for each in dict.fromkeys(module for module, layer in cells if layer is not None) if each]
        rows = {module: [cells.get((module, layer)) for layer in layers] for module in modules}
        rows = {module: row for module, row in rows.items() if any(value is not None for value in row)}
        if rows:
            _map_of_stack(f"{stack}: {title}" if stack else title, rows, layers)


def _map_of_stack(title: str, rows: dict[str, list[float | None]], layers: Sequence[int]) -> None:
    names = {module: _fitted(module, NAMES) for module in rows}
    beside = max(map(len, names.values()))
    room = (out.width or WIDTH) - beside - 12
    wide = 2 if 2 * len(layers) <= room else 1
    together = -(-len(layers) * wide // room)
    most = max((value for row in rows.values() for value in row if value is not None), default=0.0)
    out.print("\n[bold]{}[/]", title)
    for number, (module, row) in enumerate(rows.items()):
        if number == MOST_ROWS:
            out.print("{}", f"and {len(rows) - MOST_ROWS} more modules")
            break
        shown = [_largest(row[first : first + together]) for first in range(0, len(row), together)]
        known = [value for value in row if value is not None]
        out.print(
            "{} " + "".join(_cell(value, most, wide) for value in shown) + " {}",
            names[module].ljust(beside), f"≤ {_number(max(known))}" if known else "", wrap=False,
        )  # fmt: skip
    columns = f"layers {layers[0]} to {layers[-1]}" + (f", {together} a column" if together > 1 else "")
    steps = [f"{shade} from {_number(most * step / len(SHADES))}" for step, shade in enumerate(SHADES)][1:]
    for line in (columns, ", ".join(steps)):
        out.print("{}", f"{' ' * min(beside + 1, NAMES)}{line}")


def _cell(value: float | None, most: float, wide: int) -> str:
    """The shade of a value, in colour on a terminal."""
    share = 0.0 if value is None or not most > 0 else value / most
    shade = (" " if value is None else SHADES[min(int(share * len(SHADES)), len(SHADES) - 1)]) * wide
    if not out.is_terminal or value is None:
        return shade
    return f"[color({COLOURS[min(int(share * len(COLOURS)), len(COLOURS) - 1)]})]{shade}[/]"


def _largest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}" if value < 0.0995 else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _fitted(text: str, width: int) -> str:
    """A name without its start, if it is too long.

    >>> _fitted("self_attn.q_proj", 8)
    '….q_proj'
    """
    text = one_line(text)
    return text if len(text) <= width else f"…{text[len(text) - width + 1 :]}"
