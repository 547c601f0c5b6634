"""The course of the demo: two models, training with a progress bar, checks, report."""

from __future__ import annotations

import copy
from statistics import median

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import pyfast

from .comparison import compare
from .data import Corpus
from .generation import generate, readable
from .html_report import write_html
from .model import GPT
from .options import Options
from .processes import gathered, rank, shard
from .quantization import quantize
from .report import Results, environment, print_introduction, print_results, write_json
from .training import LEARNING_RATE, Run, held_out_losses, make_run, measure_memory, train

PROMPT = b"def "
SAMPLE_LENGTH = 300
SHOWN_STEPS = 20  # the figures beside the bars are medians and means over so many steps


def run(options: Options, corpus: Corpus) -> int:
    """Train, compare and report; returns the exit status. The caller's random state is kept."""
    console = Console(highlight=False, quiet=rank() > 0)
    options.out.mkdir(parents=True, exist_ok=True)
    gpus = [torch.cuda.current_device()] if options.device == "cuda" else []
    with torch.random.fork_rng(gpus):
        results = _run(options, corpus, console)
    if results is None:
        return 0
    write_json(results, options.out / "report.json")
    write_html(results, options.out / "report.html")
    print_results(results, console)
    return 1 if results.problems else 0


def _run(options: Options, corpus: Corpus, console: Console) -> Results | None:
    """The results, in the first of several processes alone."""
    torch.manual_seed(options.seed)
    stock = GPT(
        layers=options.layers, width=options.width, heads=options.heads, context=options.context
    ).to(options.device)
    patched = copy.deepcopy(stock)
    patch_report = pyfast.patch(patched)
    parameters = sum(parameter.numel() for parameter in stock.parameters())
    print_introduction(options, corpus, parameters, console)
    whole = [copy.deepcopy(model) if options.nproc > 1 else model for model in (stock, patched)]
    for model in (stock, patched):
        shard(model)
    runs = make_run("stock", stock), make_run("patched", patched)
    _replace_optimizer(runs[1], options.state_dtype)
    with _progress(console) as progress:
        _train(runs, corpus, options, progress)
    for run, like in zip(runs, whole, strict=True):
        run.model = gathered(run.model, like)
    if rank() > 0:
        return None
    for run in runs:
        run.held_out_losses = held_out_losses(run.model, corpus, options)
        measure_memory(run, corpus, options)
    comparison = compare(*runs, options)
    return Results(
        options=options,
        corpus=corpus,
        parameters=parameters,
        runs=runs,
        comparison=comparison,
        patch_report=patch_report,
        sample=readable(generate(runs[1].model, PROMPT, SAMPLE_LENGTH, options.seed)),
        # What a model that is wrong already loses says nothing about quantization.
        quantization=None
        if comparison.problems
        else quantize(runs[1].model, corpus, options, PROMPT),
        environment=environment(options.device),
    )


def _replace_optimizer(run: Run, state_dtype: str | None) -> None:
    if state_dtype is None:
        pyfast.patch_optimizer(run.optimizer)
    else:
        run.optimizer = pyfast.optim.AdamW(
            run.model.parameters(), LEARNING_RATE, state_dtype=state_dtype
        )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>7}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:7,.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
        expand=True,
    )


def _train(runs: tuple[Run, Run], corpus: Corpus, options: Options, progress: Progress) -> None:
    tasks = [
        progress.add_task(run.name, total=options.steps, loss=float("nan"), speed=float("nan"))
        for run in runs
    ]

    def show() -> None:
        for task, run in zip(tasks, runs, strict=True):
            losses = run.losses[-SHOWN_STEPS:]
            seconds = median(run.step_seconds[-SHOWN_STEPS:])
            progress.update(
                task,
                advance=1,
                loss=sum(losses) / len(losses),
                speed=options.batch * options.context / seconds,
            )

    train(runs, corpus, options, show)
