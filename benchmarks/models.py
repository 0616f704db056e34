"""Whole models under `torch.compile`: eager attention, the library's own fused one, and fusepass on eager.

    python benchmarks/models.py --out benchmarks/results/models-nvidia-h200.csv
    python benchmarks/models.py --read benchmarks/results/models-nvidia-h200.csv --markdown docs/models.md
    python benchmarks/models.py --small --device cpu      the same models, tiny, to check that everything runs

Random weights in bfloat16, random data, no dropout.  "forward" is inference; "training" is a step: forward,
backward and a fused AdamW.  "sdpa" and "flash_attention_2" are transformers' own `attn_implementation`; if a
model has none, or one that leaves something out, the row says so.  The loss, with the same weights and data,
shows that all compute the same.  Compiling is distributed over processes; while one process is timed, all
others pause.
"""

from __future__ import annotations

import argparse
import csv
import gc
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fusepass.reports.collector import collect
from fusepass.selection import clock as bench_clock
from fusepass.selection.machine import machine
from fusepass.tools.bench.pool import Exclusive, spread

CONTENDERS = ("eager", "sdpa", "flash_attention_2", "fusepass")


@dataclass(frozen=True)
class Row:
    """One measurement."""

    model: str
    mode: str
    contender: str
    batch: int
    length: int
    parameters: int | None = None
    milliseconds: float | None = None
    peak_bytes: int | None = None
    compile_seconds: float | None = None
    loss: float | None = None
    kernels: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Job:
    model: str
    mode: str
    contender: str
    device: str
    small: bool
    repeats: int


@dataclass(frozen=True)
class Case:
    """A model.

    make: ``make(small)`` returns its configuration and class.
    without: implementations of attention that leave out a part of the model's, and which part.
    """

    make: Callable[[bool], tuple[Any, Any]]
    batch: int
    length: int
    kind: str = "text"
    padded: bool = False
    without: tuple[tuple[str, str], ...] = ()


def llama(small: bool) -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = (64, 2, 4, 2, 128, 100) if small else (2048, 16, 32, 8, 8192, 32000)
    hidden, layers, heads, kv_heads, inner, words = sizes
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=inner, vocab_size=words, max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    return config, LlamaForCausalLM


def gpt2(small: bool) -> tuple[Any, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 100} if small else {}
    return GPT2Config(**sizes, use_cache=False), GPT2LMHeadModel


def t5(small: bool) -> tuple[Any, Any]:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    if small:
        sizes = {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2, "d_kv": 32, "vocab_size": 100}
    return T5Config(**sizes, use_cache=False, decoder_start_token_id=0), T5ForConditionalGeneration


def gemma2(small: bool) -> tuple[Any, Any]:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    hidden, layers, heads, inner, words = (64, 2, 2, 128, 100) if small else (2304, 8, 8, 9216, 32000)
    config = Gemma2Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 2, head_dim=32 if small else 256, intermediate_size=inner,
        vocab_size=words, sliding_window=1024, use_cache=False,
    )  # fmt: skip
    return config, Gemma2ForCausalLM


def vit(small: bool) -> tuple[Any, Any]:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2} if small else {}
    return ViTConfig(**sizes, num_labels=10), ViTForImageClassification


def swin(small: bool) -> tuple[Any, Any]:
    from transformers import SwinConfig, SwinForImageClassification

    sizes: dict[str, Any] = {"embed_dim": 24, "depths": [2, 2], "num_heads": [1, 2]} if small else {}
    return SwinConfig(**sizes, num_labels=10), SwinForImageClassification


_CAPPED = (("sdpa", "leaves out the softcap"),)
CASES = {
    "llama 1B": Case(llama, 2, 2048),
    "llama 1B, padded": Case(llama, 2, 2048, padded=True),
    "gpt2": Case(gpt2, 16, 1024),
    "t5": Case(t5, 16, 512, "pair"),
    "gemma2": Case(gemma2, 2, 4096, without=_CAPPED),
    "vit": Case(vit, 128, 197, "image"),
    "swin": Case(swin, 128, 49, "image"),
}


def data(case: Case, config: Any, small: bool, device: str, labels: bool) -> dict[str, torch.Tensor]:
    """Random inputs."""
    generator = torch.Generator().manual_seed(0)
    batch, length = (2, 64) if small else (case.batch, case.length)
    if case.kind == "image":
        size = config.image_size
        pixels = torch.randn(batch, 3, size, size, generator=generator)
        inputs = {"pixel_values": pixels.to(device, torch.bfloat16)}
        return inputs | ({"labels": torch.arange(batch, device=device) % 10} if labels else {})
    words = torch.randint(0, config.vocab_size, (batch, length), generator=generator).to(device)
    inputs = {"input_ids": words}
    if case.padded:
        first = torch.linspace(0, length // 2, batch).long()[:, None]
        inputs["attention_mask"] = (torch.arange(length) >= first).long().to(device)
    if labels:
        inputs["labels"] = words
    elif case.kind == "pair":
        inputs["decoder_input_ids"] = words
    return inputs


def measured(job: Job, exclusive: Exclusive) -> tuple[Row, bool]:
    """Measure in a separate process; returns a row, and whether the process must be replaced."""
    case = CASES[job.model]
    batch, length = (2, 64) if job.small else (case.batch, case.length)
    row = Row(job.model, job.mode, job.contender, batch, length)
    problem = dict(case.without).get(job.contender)
    if problem is not None:
        return replace(row, problem=problem), False
    try:
        row = _measure(job, case, row, exclusive)
    except Exception as error:
        row = replace(row, problem=f"{type(error).__name__}: {error}".splitlines()[0][:200])
    torch._dynamo.reset()
    gc.collect()
    return row, True  # a fresh process for each: models are large


def _measure(job: Job, case: Case, row: Row, exclusive: Exclusive) -> Row:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    training, device = job.mode == "training", torch.device(job.device)
    config, make = case.make(job.small)
    implementation = "eager" if job.contender == "fusepass" else job.contender
    with torch.device(device):
        model = make._from_config(config, attn_implementation=implementation, dtype=torch.bfloat16)
    given = data(case, config, job.small, job.device, labels=True)
    step = _step(model, given, job, training)
    with collect() as reports, torch.set_grad_enabled(training):
        start = time.perf_counter()
        loss = step()
        loss = float(loss)
        seconds = time.perf_counter() - start
    with exclusive(), torch.set_grad_enabled(training):
        peak = bench_clock.peak(step, device)
        milliseconds = bench_clock.timed(step, device, job.repeats)
    sites = [s.kernel or "unfused" for s in reports.sites]
    kernels = "; ".join(f"{sites.count(k)} {k}" for k in dict.fromkeys(sites))
    return replace(
        row, parameters=sum(p.numel() for p in model.parameters()), milliseconds=milliseconds,
        peak_bytes=peak, compile_seconds=round(seconds, 1), loss=loss, kernels=kernels,
    )  # fmt: skip


def _step(model: Any, given: dict[str, torch.Tensor], job: Job, training: bool) -> Callable[[], Any]:
    backend = "fusepass" if job.contender == "fusepass" else "inductor"
    model.train(training)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "dropout_prob", "drop_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    compiled = torch.compile(model, backend=backend, dynamic=False)
    if not training:
        return lambda: compiled(**given).loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=job.device == "cuda")

    def step() -> Any:
        loss = compiled(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


# ---------------------------------------------------------------------------------------- results


def write(rows: list[Row], place: Path, about: dict[str, str]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    order = list(CASES)
    with place.open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in about.items())
        writer = csv.writer(file)
        writer.writerow([f.name for f in fields(Row)])
        for row in sorted(rows, key=lambda r: (order.index(r.model), r.mode, CONTENDERS.index(r.contender))):
            writer.writerow(["" if v is None else v for v in asdict(row).values()])


def read(place: Path) -> tuple[list[Row], dict[str, str]]:
    lines = place.read_text().splitlines()
    about = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    kinds: dict[str, Any] = {
        "batch": int, "length": int, "parameters": int, "milliseconds": float, "peak_bytes": int,
        "compile_seconds": float, "loss": float,
    }  # fmt: skip
    rows = [
        Row(**{n: (kinds[n](t) if t else None) if n in kinds else t for n, t in entry.items()})
        for entry in csv.DictReader(line for line in lines if not line.startswith("#"))
    ]
    return rows, about


HEAD = (
    "model", "pass", "batch × length", "eager", "sdpa", "flash 2", "fusepass", "× eager", "× by hand",
    "kernels",
)  # fmt: skip


def lines(rows: list[Row]) -> list[list[str]]:
    """One line per model and pass: milliseconds, and how many times as fast fusepass is."""
    table: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        table.setdefault((row.model, row.mode), {})[row.contender] = row
    table_rows = []
    for (model, mode), by_contender in table.items():
        spent = {c: by_contender[c].milliseconds if c in by_contender else None for c in CONTENDERS}
        by_hand = [t for c in ("sdpa", "flash_attention_2") if (t := spent[c]) is not None]
        mine, row = spent["fusepass"], next(iter(by_contender.values()))
        others = (spent["eager"], min(by_hand, default=None))
        fast = ["" if t is None or mine is None else f"{t / mine:.2f}" for t in others]
        table_rows.append(
            [model, mode, f"{row.batch} × {row.length}"]
            + ["" if spent[c] is None else f"{spent[c]:.2f}" for c in CONTENDERS]
            + [*fast, by_contender["fusepass"].kernels if "fusepass" in by_contender else ""]
        )
    return table_rows


ABOUT = """\
Median milliseconds of one forward pass, or of one training step with a fused AdamW, under `torch.compile`;
bfloat16, random weights and data. `eager`, `sdpa` and `flash 2` are transformers' `attn_implementation`, and
fusepass is given the eager model. The last columns say how many times as fast it is, and what it chose."""


def markdown(rows: list[Row], about: dict[str, str], place: Path) -> str:
    """The page."""
    text = [f"# Whole models, measured on {about['device']}", ""]
    text += [
        f"Made by `python benchmarks/models.py` from [{place.name}](../{place}), measured with:",
        "",
        *(f"- {k}: {v}" for k, v in about.items()),
        "",
        ABOUT,
        "",
    ]
    text += [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    text += [f"| {' | '.join(line)} |" for line in lines(rows)]
    problems = {f"{r.model}, {r.contender}: {r.problem}" for r in rows if r.problem}
    if problems:
        text += ["", "Not measured:", "", *sorted(f"- {p}" for p in problems)]
    losses: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.loss is not None:
            losses.setdefault((row.model, row.mode), []).append(row.loss)
    apart = max((max(x) - min(x)) / max(map(abs, x)) for x in losses.values()) if losses else math.nan
    text += ["", f"The losses of all contenders of a row agree to {apart:.1e} relative.", ""]
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--models", help=f"from {', '.join(CASES)}, separated by semicolons")
    option("--modes", default="forward,training")
    option("--contenders", default=",".join(CONTENDERS))
    option("--device", default="cuda")
    option("--small", action="store_true", help="tiny models")
    option("--repeats", type=int, default=20)
    option("--workers", type=int, default=1)
    option("--limit", type=float, help="start no new measurement after this many seconds")
    option("--add", action="store_true", help="keep rows of the file that are not measured again")
    option("--load", help="what else the machine was doing, for the description in the CSV file")
    option("--out", type=Path, default=Path("models.csv"))
    option("--read", type=Path, help="show these results instead of measuring")
    option("--markdown", type=Path)
    arguments = parser.parse_args()
    if arguments.read:
        rows, about = read(arguments.read)
    else:
        about, rows = machine(arguments.device), []
        if arguments.add and arguments.out.exists():
            rows = read(arguments.out)[0]
        about["transformers"] = __import__("transformers").__version__
        if arguments.load:
            about["load"] = arguments.load
        names = arguments.models.split(";") if arguments.models else list(CASES)
        jobs = [
            Job(name, mode, contender, arguments.device, arguments.small, arguments.repeats)
            for name in names for contender in reversed(arguments.contenders.split(","))
            for mode in arguments.modes.split(",")
        ]  # fmt: skip

        def keep(row: Row) -> None:
            same = (row.model, row.mode, row.contender)
            rows[:] = [r for r in rows if (r.model, r.mode, r.contender) != same]
            rows.append(row)
            write(rows, arguments.out, about)

        def failed(job: Job, why: str) -> Row:
            case = CASES[job.model]
            return Row(job.model, job.mode, job.contender, case.batch, case.length, problem=why)

        spread(jobs, measured, failed, arguments.workers, keep, arguments.limit, patience=500.0)
    table = Table(*HEAD, title="Whole models, median milliseconds", title_justify="left")
    for line in lines(rows):
        table.add_row(*line)
    console = Console(width=None if Console().is_terminal else 170)
    console.print(table)
    for row in rows:
        if row.problem:
            text = f"{row.model}, {row.mode}, {row.contender}: {row.problem}"
            console.print(text, highlight=False, markup=False)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows, about, arguments.read or arguments.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
