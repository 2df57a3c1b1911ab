"""The command line: `techniques measure pick run papers zoo`. It parses, calls the library and prints; whatever computes is imported by its verb.

An error the user can mend is one sentence on stderr and exit code 2 (`HASTEN_TRACEBACK=1` shows where it came from); Ctrl-C ends with 130
after saying what was kept. With `--json`, stdout holds exactly one JSON document.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hasten import terminal
from hasten.answering import answer, read_messages, sampling_of, with_sampling
from hasten.recipe import Recipe, Use, load_recipe
from hasten.terminal import note
from hasten.values import Prompt, Request, UserError

# ---------------------------------------------------------------------------------------------------------------- errors


class Verbs(TyperGroup):
    """The group of verbs, which turns the errors of all of them into sentences."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except UserError as error:
            _end(str(error), 2)
        except OSError as error:
            _end(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error), 2)
        except KeyboardInterrupt:
            _end("interrupted", 130)


def _end(sentence: str, code: int) -> None:
    if os.environ.get("HASTEN_TRACEBACK") == "1":
        traceback.print_exc()
    note(f"hasten: {' '.join(sentence.split())}")
    raise typer.Exit(code)


@contextlib.contextmanager
def _keeping(kept: Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C, say what was kept."""
    try:
        yield
    except KeyboardInterrupt:
        _end(f"interrupted; {kept()}", 130)


# --------------------------------------------------------------------------------------------------- options and completion


def _technique_names(incomplete: str) -> list[str]:
    from hasten.techniques import TECHNIQUES

    return [name for name in TECHNIQUES if name.startswith(incomplete)]


def _zoo_names(incomplete: str) -> list[str]:
    from hasten.zoo import NAMES

    return [name for name in NAMES if name.startswith(incomplete)]


def _paper_names(incomplete: str) -> list[str]:
    from hasten.papers import PAPERS

    return [name for name in PAPERS if name.startswith(incomplete)]


def _sources(incomplete: str) -> list[str]:
    return [f"zoo:{name}" for name in _zoo_names("") if f"zoo:{name}".startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]
_TASK = "A built-in task, or a JSONL file with `prompt` or `messages`, and `answer` if known."
Task = Annotated[str | None, typer.Option(help=_TASK)]
Source = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Directory, hub id or zoo:NAME; the zoo if left out.", autocompletion=_sources)
]
With = Annotated[
    list[str] | None,
    typer.Option(
        "--with", metavar="TECHNIQUE", help="A technique to consider, with its options; repeat for more.", autocompletion=_technique_names
    ),
]
Budget = Annotated[
    list[str] | None, typer.Option(metavar="NAME=NUMBER", help="Most that a request may cost: seconds=1, p95_ttft=0.2, …; repeatable.")
]
Target = Annotated[list[str] | None, typer.Option(metavar="NAME=NUMBER", help="Least quality: accuracy=0.9; repeatable.")]
Out = Annotated[Path, typer.Option(help="Directory for what is written.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests in flight at a time.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto, or torch's name of a type, for example bfloat16.")]
Threads = Annotated[str, typer.Option(help="auto, or the number of processor threads of each model.")]
Workers = Annotated[str | None, typer.Option(help="Answer in so many processes, each on cores of its own; auto: one a NUMA node.")]
Template = Annotated[str, typer.Option(help="auto: prompts go through the tokenizer's chat template if it has one; off: as they are.")]

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Measure what inference-acceleration techniques are worth on your model and machine, and pick the compute-optimal combination.",
    epilog="Start with [bold]hasten pick[/bold]: it needs no arguments. HASTEN_TRACEBACK=1 shows where an error comes from.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from hasten import __version__

        print(f"hasten {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


def _amounts(kind: str, texts: list[str]) -> dict[str, float]:
    """`["seconds=1"]` -> `{"seconds": 1.0}`; UserError for what is not NAME=NUMBER, or is given twice."""
    amounts: dict[str, float] = {}
    for text in texts:
        name, mark, number = (part.strip() for part in text.partition("="))
        if not (name and mark and number):
            raise UserError(f"--{kind} {text!r}: write it as NAME=NUMBER, for example --{kind} {_EXAMPLE[kind]}")
        if name in amounts:
            raise UserError(f"--{kind} {name} is given twice")
        amounts[name] = _number(f"--{kind} {text!r}", number)
    return amounts


_EXAMPLE = {"budget": "seconds=1", "target": "accuracy=0.9"}


def _number(where: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{where}: {text!r} is not a number") from None
    if not math.isfinite(value) or value < 0:
        raise UserError(f"{where}: must be a finite number, not below 0")
    return value


# ----------------------------------------------------------------------------------------------------------------- verbs


@app.command(epilog="Example: [bold]hasten techniques --json[/bold]")
def techniques(json_: Json = False) -> None:
    """List the techniques: what each changes, how exact it is, its options, and why it cannot be used here if so."""
    from hasten.techniques import TECHNIQUES

    rows = [_technique_row(name) for name in TECHNIQUES]
    terminal.print_json(rows) if json_ else terminal.show_techniques(rows)


def _technique_row(name: str) -> dict[str, Any]:
    from hasten.techniques import options_of, technique, why_not

    options: list[dict[str, Any]] = []
    try:
        options = [asdict(option) for option in options_of(name)]
        reason = why_not(Recipe("", (Use(name),)))
    except UserError as error:
        reason = str(error)
    t = technique(name)
    about = {"name": name, "slot": t.slot, "family": t.family, "exactness": t.exactness, "options": options}
    return {**about, "why_not": reason, "paper": t.paper, "summary": t.summary}


@app.command(epilog='Example: [bold]hasten measure zoo:arith-s "zoo:arith-s +vote(n=8)" --task arith[/bold]')
def measure(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Models with techniques, or recipe.json files.", autocompletion=_sources)
    ],
    task: Annotated[str, typer.Option(help=_TASK)] = "arith",
    items: Annotated[int, typer.Option(min=1, help="Problems that quality is measured on, at most.")] = 200,
    concurrency: Concurrency = 1,
    out: Out = Path("hasten-out"),
    template: Template = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = "auto",
    workers: Workers = None,
    json_: Json = False,
) -> None:
    """Measure recipes on a task: quality with its interval, and what a request costs. Nothing is picked."""
    from hasten.measure.measure import measure as run

    parsed = [load_recipe(text) for text in recipes]
    with _keeping(lambda: _measured(out)), terminal.Progress() as progress, contextlib.redirect_stdout(sys.stderr):
        found = run(
            parsed, task=task, n=items, concurrency=concurrency, out=str(out), template=template, device=device, dtype=dtype,
            threads=threads, workers=workers, progress=progress,
        )  # fmt: skip
    terminal.print_json(found) if json_ else terminal.show_measurements("", found)


def _measured(out: Path) -> str:
    """What a run that was interrupted leaves."""
    file = out / "measurements.jsonl"
    count = len(file.read_text("utf-8").splitlines()) if file.is_file() else 0
    if not count:
        return "nothing was measured yet"
    return f"{count} measurement{'s' if count > 1 else ''} kept in {file}; the same command goes on from there"


@app.command(epilog='Example: [bold]hasten pick ./my-model --task prompts.jsonl --with "ngram(k=4)" --budget seconds=2[/bold]')
def pick(
    source: Source = None,
    task: Task = None,
    with_: With = None,
    budget: Budget = None,
    target: Target = None,
    lossless: Annotated[bool, typer.Option("--lossless", help="Only techniques that keep the distribution of the output.")] = False,
    concurrency: Concurrency = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be measured, and stop.")] = False,
    out: Out = Path("hasten-out"),
    template: Template = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = "auto",
    json_: Json = False,
) -> None:  # fmt: skip
    """Measure combinations of techniques and pick the best one inside the budget. Without arguments: on the models that ship with hasten.

    Writes recipe.json, measurements.jsonl and report.html to --out. Without --budget, it is what greedy decoding of the largest model costs.
    """
    from hasten.measure.pick import pick as run

    budgets, targets = _amounts("budget", budget or []), _amounts("target", target or [])
    with _keeping(lambda: _measured(out)), terminal.Progress() as progress, contextlib.redirect_stdout(sys.stderr):
        document = run(
            source, task=task, techniques=tuple(with_ or ()), budgets=budgets, targets=targets, lossless=lossless, concurrency=concurrency,
            dry_run=dry_run, out=str(out), template=template, device=device, dtype=dtype, threads=threads,
            progress=progress,
        )  # fmt: skip
    terminal.print_json(document) if json_ else terminal.show_pick(document)


@app.command(epilog='Example: [bold]hasten run "zoo:arith-m +ngram" --prompt "a = 7 ; b = a * 3 ; ? b :"[/bold]')
@with_sampling
def run(
    recipe: Annotated[str, typer.Argument(help="Model with techniques, or a recipe.json file.", autocompletion=_sources)],
    prompt: Annotated[str | None, typer.Option(help="The prompt; `-` reads it from stdin.")] = None,
    messages: Annotated[Path | None, typer.Option(help="JSON file with chat messages: [{role, content}, …].")] = None,
    template: Template = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = "auto",
    json_: Json = False,
    **sampling: Any,
) -> None:
    """Answer one prompt. The answer streams to stdout; what it cost goes to stderr."""
    if (prompt is None) == (messages is None):
        raise UserError("give either --prompt TEXT or --messages FILE")
    chosen = sampling_of(sampling)
    asked: Prompt = read_messages(messages) if messages else sys.stdin.read() if prompt == "-" else prompt or ""
    with contextlib.redirect_stdout(sys.stderr):
        from hasten.load import load

        loaded = load(recipe, template=template, device=device, dtype=dtype, threads=threads)
        if loaded.templated:
            note("the prompt goes through the model's chat template (--template off to stop it)")
        request = Request(loaded.ask(asked), chosen, id="0")
    streaming = not json_ and chosen.n == 1
    first = answer(loaded, request, (lambda text: print(text, end="", flush=True)) if streaming else (lambda text: None))
    results = [first, *first.others]
    if json_:
        terminal.print_json({"recipe": loaded.recipe.to_json(), "results": [asdict(r) | {"others": ()} for r in results]})
    elif not streaming:
        print("\n".join(f"--- {i + 1} of {len(results)}\n{r.text}" for i, r in enumerate(results)))
    terminal.show_ledger(first.usage)
    if (seconds := loaded.startup["compile"]) >= 1:
        note(f"compiling took {seconds:.0f} s of this; what was compiled is kept for the next start")


@app.command(epilog="Example: [bold]hasten papers cpu-inference[/bold]")
def papers(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Paper to measure; all are listed if left out.", autocompletion=_paper_names)
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="The long form: goes on where it was interrupted, and writes its result.")] = False,
    out: Annotated[Path, typer.Option(help="Directory with the results of full runs.")] = Path("results"),
    json_: Json = False,
) -> None:
    """Measure what papers claim, here: a claim holds, fails, is undecided, or cannot be tested on this machine.

    The quick form takes at most 3 minutes on two cores and keeps nothing; --full writes NAME/MACHINE.json to --out.
    """
    from hasten.papers.run import listing, measure

    if name is None:
        if full:
            raise UserError("--full: name the paper to measure; `hasten papers` lists them")
        rows = listing(out)
        terminal.print_json(rows) if json_ else terminal.show_papers(rows)
        return
    with _keeping(lambda: _papers_kept(full)), terminal.Progress() as progress, contextlib.redirect_stdout(sys.stderr):
        document = measure(name, full=full, out=out, log=progress.log)
    terminal.print_json(document) if json_ else terminal.show_paper(document)


def _papers_kept(full: bool) -> str:
    return "what was measured is kept; the same command goes on from there" if full else "the quick form keeps nothing"


# ------------------------------------------------------------------------------------------------------------------- zoo

zoo = typer.Typer(no_args_is_help=True, help="The tiny models that ship with hasten: list, train, measure.", rich_markup_mode="rich")
app.add_typer(zoo, name="zoo")
Name = Annotated[str, typer.Argument(help="Name of the model, as `hasten zoo list` shows it.", autocompletion=_zoo_names)]


def _zoo_name(name: str) -> str:
    from hasten.zoo import spec

    name = name.removeprefix("zoo:")
    spec(name)  # UserError for an unknown one
    return name


@zoo.command("list")
def zoo_list(json_: Json = False) -> None:
    """List the models and whether their weights are here."""
    from hasten.zoo import NAMES

    rows = [{"name": name, **asdict(spec), "path": _zoo_path(name)} for name, spec in NAMES.items()]
    cells = [
        (r["name"], r["kind"], str(r["layers"]), str(r["width"]), r["path"] or "not here: hasten zoo train " + r["name"]) for r in rows
    ]
    terminal.print_json(rows) if json_ else terminal.table("", ("name", "kind", ">layers", ">width", "path"), cells)


def _zoo_path(name: str) -> str | None:
    from hasten.zoo import path

    try:
        return str(path(name))
    except UserError:  # its weights are not here
        return None


@zoo.command("train", epilog="Example: [bold]hasten zoo train arith-xs[/bold]")
def zoo_train(
    name: Name,
    out: Annotated[Path | None, typer.Option(help="Directory for the model; beside its checkpoints if left out.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew instead of resuming from the last checkpoint.")] = False,
    json_: Json = False,
) -> None:
    """Train a model as it was trained for shipping; goes on from the last checkpoint."""
    name = _zoo_name(name)
    from hasten.zoo.train import train

    kept = _keeping(lambda: f"the last checkpoint of {name} is kept; the same command goes on from there")
    with kept, terminal.Progress() as progress, contextlib.redirect_stdout(sys.stderr):
        where = train(name, out=out, resume=not fresh, progress=lambda p: progress.update(name, p["step"], p["steps"]))
    terminal.print_json({"name": name, "path": str(where)}) if json_ else print(where)


@zoo.command("eval", epilog="Example: [bold]hasten zoo eval arith-xs --n 500[/bold]")
def zoo_eval(
    name: Name, n: Annotated[int, typer.Option(min=1, help="Number of problems, or windows of text.")] = 2000, json_: Json = False
) -> None:
    """Measure again what a model's card says."""
    name = _zoo_name(name)
    from hasten.zoo.evaluate import evaluate

    with contextlib.redirect_stdout(sys.stderr):
        found = evaluate(name, n=n)
    if json_:
        terminal.print_json(found)
    else:
        terminal.table("", ("measured", ">value"), [(key, str(value)) for key, value in found.items()])


def main() -> None:
    """Entry point of the `hasten` command."""
    app()
