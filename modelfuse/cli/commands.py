"""The commands: words behind each in, what it does, an exit status out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from modelfuse.cli import console
from modelfuse.cli.arguments import Options, parse, parse_demo, parse_options, parse_push, parse_verify
from modelfuse.cli.drawing import Drawing, tell_written
from modelfuse.errors import RecipeError
from modelfuse.recipe.installed_methods import register_installed
from modelfuse.recipe.names import renew
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import PathOrUrl, path_or_url

if TYPE_CHECKING:
    from modelfuse.planning.plan import Plan

Command = Callable[[list[str], Mapping[str, object]], int]


def show_help(words: list[str]) -> int:
    """What there is to say first, or of one command."""
    from modelfuse.cli.help import help_page, usage
    from modelfuse.cli.help_pages import PAGES

    if not words:
        usage()
    elif words[0] in PAGES:
        help_page(words[0])
    else:
        raise RecipeError(f"There is no command {words[0]!r}", LISTED)
    return 0


def _check(words: list[str], defaults: Mapping[str, object]) -> int:
    from modelfuse.cli import progress, render
    from modelfuse.planning.hub import headers
    from modelfuse.planning.output_location import check_disk_space

    settings, options = parse(words, "check", defaults)
    recipe = _begin(settings, options, console.err if options.json else console.out)
    with headers(recipe, progress.watch(options.quiet)) as at_hand:
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


def _merge(words: list[str], defaults: Mapping[str, object]) -> int:
    return _run(*_begun(words, "merge", defaults))


def _moe(words: list[str], defaults: Mapping[str, object]) -> int:
    """The same of a configuration with experts only."""
    recipe, options = _begun(words, "moe", defaults)
    if recipe.mergekit is None or recipe.configurations.mixture is None:
        raise RecipeError("moe takes a configuration with experts:", "`modelfuse help moe` shows one.")
    return _run(recipe, options)


def _begun(words: list[str], command: str, defaults: Mapping[str, object]) -> tuple[Recipe, Options]:
    settings, options = parse(words, command, defaults)
    return _begin(settings, options, console.err), options


def _run(recipe: Recipe, options: Options) -> int:
    from modelfuse.cli import progress, render

    quiet = options.quiet
    if recipe.output_path is None:
        raise RecipeError("output_path is not given", "Name the folder to create with --output_path.")
    Drawing(options.html).check()
    from modelfuse.planning.hub import fetch

    recipe = fetch(recipe, progress.watch(quiet))
    from modelfuse.execution.intermediate import keep_intermediate
    from modelfuse.execution.run import run_plan

    keep_intermediate(recipe)
    plan = _plan(recipe)

    with progress.merging(plan, quiet) as advance:
        result = run_plan(plan, advance, _tell(quiet))
    if options.json:
        from modelfuse.cli import documents, json_output

        json_output.write(documents.of_result(plan, result))
    elif not quiet:
        render.result(plan, result)
    if options.html is not None:
        from modelfuse.inspection.pictures.merge_page import write_merge_page

        write_merge_page(recipe, result.output_path, options.html)
        tell_written([options.html], options)
    return 0


def _tune(words: list[str], defaults: Mapping[str, object]) -> int:
    from modelfuse.cli.tune import run

    return run(words, defaults)


def _mergekit(command: str) -> Command:
    """A command line of mergekit's."""

    def run(words: list[str], defaults: Mapping[str, object]) -> int:
        from modelfuse.cli.mergekit import extracted, translated

        meant = (extracted if command.endswith("extract-lora") else translated)(command, words)
        if not {"--quiet", "-q"} & set(words):
            for text in meant.notes:
                _tell(False)(text)
        return _merge(meant.words, defaults)

    return run


def _begin(settings: Mapping[str, object], options: Options, voice: console.Voice) -> Recipe:
    """Speak as was asked for, first of what can be said before anything is read."""
    from modelfuse.cli import render

    console.begin_logs(options.verbose, options.log_file)
    recipe = Recipe.parse(settings)
    render.details(recipe)
    if not options.quiet:
        render.warnings(recipe, voice)
    return recipe


def _verify(words: list[str], _: Mapping[str, object]) -> int:
    from modelfuse.cli import progress, render
    from modelfuse.inspection.verify import verify_output
    from modelfuse.kernels.jit.compile import announcing

    given, options = parse_verify(words)
    console.begin_logs(options.verbose, options.log_file)
    folder = _place(given.pop("folder"))
    with progress.verifying(folder, options.quiet) as advance, announcing(_tell(options.quiet)):
        found = verify_output(folder, **given, progress=advance, tell=_tell(options.quiet))
    render.verification(found, options.quiet or options.json)
    if options.json:
        from modelfuse.cli import documents, json_output

        json_output.write(documents.of_verification(found))
    return 0 if found.holds else 2


def _inspect(words: list[str], _: Mapping[str, object]) -> int:
    from modelfuse.cli.inspect_command import look

    return look(words)


def _collect(words: list[str], _: Mapping[str, object]) -> int:
    from modelfuse.cli.collect_command import collect_inputs

    return collect_inputs(words)


def _report(words: list[str], _: Mapping[str, object]) -> int:
    from modelfuse.cli.report_command import run_report

    return run_report(words)


def _diff(words: list[str], _: Mapping[str, object]) -> int:
    from modelfuse.cli.diff_command import compare

    return compare(words)


def _push(words: list[str], _: Mapping[str, object]) -> int:
    from modelfuse.cli import render
    from modelfuse.planning.hub.upload import push_folder

    given, options = parse_push(words)
    console.begin_logs(options.verbose, options.log_file)
    pushed = push_folder(
        Path(given["folder"]),
        given["name"],
        public=given.get("public", False),
        overwrite=given.get("overwrite", False),
        endpoint=given.get("hub_endpoint"),
        tell=_tell(options.quiet),
    )
    if options.json:
        from modelfuse.cli import documents, json_output

        json_output.write(
            documents.Push(name=pushed.name, url=pushed.url, commit=pushed.commit, private=pushed.private)
        )
    elif not options.quiet:
        render.pushed(pushed)
    return 0


def _demo(words: list[str], _: Mapping[str, object]) -> int:
    from modelfuse.cli import render
    from modelfuse.cli.demo import make_models

    given, options = parse_demo(words)
    console.begin_logs(options.verbose, options.log_file)
    folder = Path(given["folder"])
    commands = make_models(folder)
    if not options.quiet:
        render.demo(folder, commands)
    return 0


def _methods(words: list[str], _: Mapping[str, object]) -> int:
    options = parse_options("methods", words)
    if register_installed():
        renew()
    if options.json:
        from modelfuse.cli import documents, json_output

        json_output.write(documents.of_methods())
        return 0
    from modelfuse.cli.help import methods

    methods()
    return 0


def _warm(words: list[str], _: Mapping[str, object]) -> int:
    """Compile the kernels of some methods, or of all."""
    from modelfuse.kernels.adaptive import every_kind, warm
    from modelfuse.kernels.jit.code_cache import kept_in
    from modelfuse.kernels.jit.compile import compiler_missing
    from modelfuse.methods.registry import METHODS
    from modelfuse.recipe.checks import nearest

    options = parse_options("warm", [word for word in words if word.startswith("-")])
    names = [word for word in words if not word.startswith("-")]
    for name in names:
        if name not in METHODS:
            raise RecipeError(f"There is no method {name!r}", nearest(name, METHODS))
    if missing := compiler_missing():
        raise RecipeError(f"Nothing can be compiled: {missing}", "Merges use numpy then, to the same bytes.")
    works = every_kind(names or METHODS)
    total = str(len(works))
    warm(works, lambda done: None if options.quiet else console.err.say("compiled {} of {}", str(done), total))
    if not options.quiet:
        console.out.say("compiled kernels are kept in {}", str(kept_in() or "no folder: none can be written to"))
    return 0


def _completion(words: list[str], _: Mapping[str, object]) -> int:
    from modelfuse.cli.completion import SHELLS, script

    if len(words) != 1 or words[0] not in SHELLS:
        raise RecipeError("completion takes the name of a shell", f"Give one of {', '.join(SHELLS)}.")
    print(script(words[0]))
    return 0


#: Command lines of arcee's mergekit.
MERGEKIT = ("mergekit-yaml", "mergekit-multi", "mergekit-pytorch", "mergekit-moe", "mergekit-extract-lora")
#: What each command does with the words behind it, and settings to take where those say nothing.
COMMANDS: dict[str, Command] = {
    "merge": _merge, "check": _check, "verify": _verify, "tune": _tune, "inspect": _inspect, "diff": _diff, "moe": _moe,
    "report": _report, "push": _push, "collect": _collect, "demo": _demo, "methods": _methods, "warm": _warm,
    "completion": _completion,
    **{name: _mergekit(name) for name in ("extract-lora", *MERGEKIT)},
}  # fmt: skip
LISTED = f"The commands are {', '.join(COMMANDS)}; `modelfuse --help` tells more."


def _plan(recipe: Recipe) -> Plan:
    from modelfuse.planning.plan import make_plan

    gc.disable()  # Nothing in a plan is a cycle; looking for some takes a third of the time.
    try:
        return make_plan(recipe)
    finally:
        gc.enable()


def _tell(quiet: bool) -> Callable[[str], None]:
    """Where to say what the user may wonder about."""
    from modelfuse.cli import render

    return (lambda _: None) if quiet else render.note


def _place(word: str) -> PathOrUrl:
    try:
        return path_or_url(word)
    except ValueError as error:
        raise RecipeError(f"{word}: {error}", "`modelfuse help verify` tells more.") from None
