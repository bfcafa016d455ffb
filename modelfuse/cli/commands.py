"""The commands by name. Each takes its arguments and default settings, and returns the exit status."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from modelfuse.cli import console
from modelfuse.cli.arguments import Options, parse, parse_demo, parse_options
from modelfuse.cli.drawing import Drawing, print_written
from modelfuse.errors import RecipeError
from modelfuse.recipe.installed_methods import register_installed
from modelfuse.recipe.names import renew
from modelfuse.recipe.recipe import Recipe

if TYPE_CHECKING:
    from modelfuse.planning.plan import Plan

Command = Callable[[list[str], Mapping[str, object]], int]


def show_help(argv: list[str]) -> int:
    """Print the list of commands, or the help of one."""
    from modelfuse.cli.help import help_page, usage
    from modelfuse.cli.help_pages import PAGES

    if not argv:
        usage()
    elif argv[0] in PAGES:
        help_page(argv[0])
    else:
        raise RecipeError(f"There is no command {argv[0]!r}", LISTED)
    return 0


def _check(argv: list[str], defaults: Mapping[str, object]) -> int:
    from modelfuse.cli import progress, render
    from modelfuse.planning.hub import headers
    from modelfuse.planning.output_location import check_disk_space

    settings, options = parse(argv, "check", defaults)
    recipe = _begin(settings, options, console.err if options.json else console.out)
    with headers(recipe, progress.fetching(options.quiet)) as at_hand:
        plan = _plan(at_hand)
    if not options.json:
        render.plan(plan)
    check_disk_space(plan.recipe.output_path, plan.disk_space)
    if options.json:
        from modelfuse.cli import documents, json_output

        json_output.write(documents.of_plan(plan))
    else:
        render.checked(plan)
    return 0


def _merge(argv: list[str], defaults: Mapping[str, object]) -> int:
    return _run(*_parsed(argv, "merge", defaults))


def _moe(argv: list[str], defaults: Mapping[str, object]) -> int:
    """A merge of a mergekit-moe configuration."""
    recipe, options = _parsed(argv, "moe", defaults)
    if recipe.mergekit is None or recipe.configurations.mixture is None:
        raise RecipeError("moe needs a configuration with experts:", "`modelfuse help moe` describes it.")
    return _run(recipe, options)


def _parsed(argv: list[str], command: str, defaults: Mapping[str, object]) -> tuple[Recipe, Options]:
    settings, options = parse(argv, command, defaults)
    return _begin(settings, options, console.err), options


def _run(recipe: Recipe, options: Options) -> int:
    from modelfuse.cli import progress, render

    quiet = options.quiet
    if recipe.output_path is None:
        raise RecipeError("output_path is not given", "Give the folder to create with --output_path.")
    Drawing(options.html).check()
    from modelfuse.planning.hub import fetch

    recipe = fetch(recipe, progress.fetching(quiet))
    from modelfuse.execution.intermediate import keep_intermediate
    from modelfuse.execution.run import run_plan

    keep_intermediate(recipe)
    plan = _plan(recipe)

    with progress.merging(plan, quiet) as advance:
        result = run_plan(plan, advance, render.notes_unless(quiet))
    if options.json:
        from modelfuse.cli import documents, json_output

        json_output.write(documents.of_result(plan, result))
    elif not quiet:
        render.result(plan, result)
    if options.html is not None:
        from modelfuse.inspection.pictures.merge_page import write_merge_page

        write_merge_page(recipe, result.output_path, options.html)
        print_written([options.html], options)
    return 0


def _tune(argv: list[str], defaults: Mapping[str, object]) -> int:
    from modelfuse.cli.tune_command import run

    return run(argv, defaults)


def _imported(command: str) -> Command:
    """A command without default settings, whose module is imported when it is given."""

    def run(argv: list[str], _: Mapping[str, object]) -> int:
        return int(import_module(f"modelfuse.cli.{command}_command").run(argv))

    return run


def _mergekit(command: str) -> Command:
    """The command for one of mergekit's command lines."""

    def run(argv: list[str], defaults: Mapping[str, object]) -> int:
        from modelfuse.cli import render
        from modelfuse.cli.mergekit import extracted, translated

        translation = (extracted if command.endswith("extract-lora") else translated)(command, argv)
        tell = render.notes_unless(bool({"--quiet", "-q"} & set(argv)))
        for text in translation.notes:
            tell(text)
        return _merge(translation.argv, defaults)

    return run


def _begin(settings: Mapping[str, object], options: Options, stream: console.TextStream) -> Recipe:
    """Configure the logs, parse the recipe, and print the warnings about it."""
    from modelfuse.cli import render

    console.configure_logs(options.verbose, options.log_file)
    recipe = Recipe.parse(settings)
    render.details(recipe)
    if not options.quiet:
        render.warnings(recipe, stream)
    return recipe


def _demo(argv: list[str], _: Mapping[str, object]) -> int:
    from modelfuse.cli import render
    from modelfuse.cli.demo import make_models

    given, options = parse_demo(argv)
    console.configure_logs(options.verbose, options.log_file)
    folder = Path(given["folder"])
    commands = make_models(folder)
    if not options.quiet:
        render.demo(folder, commands)
    return 0


def _methods(argv: list[str], _: Mapping[str, object]) -> int:
    options = parse_options("methods", argv)
    if register_installed():
        renew()
    if options.json:
        from modelfuse.cli import documents, json_output

        json_output.write(documents.of_methods())
        return 0
    from modelfuse.cli.help import methods

    methods()
    return 0


def _warm(argv: list[str], _: Mapping[str, object]) -> int:
    """Compile the kernels of some methods, or of all."""
    from modelfuse.kernels.adaptive import every_kind, warm, warm_products
    from modelfuse.kernels.jit.code_cache import kept_in
    from modelfuse.kernels.jit.compile import compiler_missing
    from modelfuse.methods.registry import METHODS
    from modelfuse.recipe.checks import nearest

    options = parse_options("warm", [word for word in argv if word.startswith("-")])
    names = [word for word in argv if not word.startswith("-")]
    for name in names:
        if name not in METHODS:
            raise RecipeError(f"There is no method {name!r}", nearest(name, METHODS))
    if missing := compiler_missing():
        raise RecipeError(f"Nothing can be compiled: {missing}", "Merges use numpy instead, with the same bytes.")
    works = every_kind(names or METHODS)
    total = str(len(works))
    warm(works, lambda done: None if options.quiet else console.err.print("compiled {} of {}", str(done), total))
    warm_products(names or METHODS)
    if not options.quiet:
        console.out.print("compiled kernels are stored in {}", str(kept_in() or "no folder, as none is writable"))
    return 0


def _completion(argv: list[str], _: Mapping[str, object]) -> int:
    from modelfuse.cli.completion import SHELLS, script

    if len(argv) != 1 or argv[0] not in SHELLS:
        raise RecipeError("completion needs the name of a shell", f"Give one of {', '.join(SHELLS)}.")
    print(script(argv[0]))
    return 0


#: Command lines of arcee's mergekit.
MERGEKIT = ("mergekit-yaml", "mergekit-multi", "mergekit-pytorch", "mergekit-moe", "mergekit-extract-lora")
#: The functions of the commands.
COMMANDS: dict[str, Command] = {
    "merge": _merge, "check": _check, "verify": _imported("verify"), "tune": _tune, "inspect": _imported("inspect"),
    "diff": _imported("diff"), "moe": _moe, "report": _imported("report"), "push": _imported("push"),
    "collect": _imported("collect"), "demo": _demo, "methods": _methods, "warm": _warm, "completion": _completion,
    **{name: _mergekit(name) for name in ("extract-lora", *MERGEKIT)},
}  # fmt: skip
LISTED = f"The commands are {', '.join(COMMANDS)}; `modelfuse --help` describes them."


def _plan(recipe: Recipe) -> Plan:
    from modelfuse.planning.plan import make_plan

    gc.disable()  # A plan has no reference cycles, and looking for them takes a third of the time.
    try:
        return make_plan(recipe)
    finally:
        gc.enable()
