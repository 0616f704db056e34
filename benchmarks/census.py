"""How much attention in `transformers` is fused, in all families that can be built small without a download.

    python benchmarks/census.py                     all families: takes hours, rewrites benchmarks/census.md
    python benchmarks/census.py bert llama t5       only these; writes no file
    python benchmarks/census.py --limit 20 --inner aot_eager --no-inductor      a quick look
    python benchmarks/census.py --rows rows.jsonl   continues where it was interrupted
    python benchmarks/census.py --jobs 14           this many families at a time
    python benchmarks/census.py --quality           what fused calls read over queries and keys; rewrites that
                                                    section of benchmarks/census.md

A site is a softmax between two batched matrix products. Sites are counted in the ATen graph without and with
the pass; those that the second count no longer finds are fused. Models have eager attention and random
weights, and each runs in a separate process. The share is the time of the pass divided by the time of the
whole `torch.compile` with the backend `--inner`, with empty caches. If that backend is not TorchInductor and
the share is above 5%, the share with TorchInductor is measured too, unless `--no-inductor` is given.
"""

import argparse
import gc
import inspect
import json
import logging
import multiprocessing
import operator
import os
import platform
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

HERE = Path(__file__).parent
BATCH, LENGTH, TOKENS = 2, 24, 99
TOLERANCE = 1e-3
"""The largest accepted difference from eager, relative to the largest value of an output."""
LARGEST = 60_000_000
"""Number of parameters: families that cannot be made smaller are left out."""

Model = torch.nn.Module
Inputs = dict[str, torch.Tensor]
Row = dict[str, Any]
Compiler = Callable[..., Any]


# ---------------------------------------------------------------------------------------- small models

SMALL: dict[int, str] = {
    2: "num_hidden_layers num_layers num_decoder_layers num_encoder_layers encoder_layers decoder_layers "
    "n_layer n_layers depth num_key_value_heads num_experts_per_tok eos_token_id",
    4: "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads "
    "num_experts num_local_experts n_routed_experts type_vocab_size",
    8: "patch_size qk_rope_head_dim qk_nope_head_dim sliding_window",
    16: "head_dim d_kv v_head_dim q_lora_rank kv_lora_rank num_mel_bins",
    32: "image_size moe_intermediate_size",
    64: "hidden_size d_model n_embd embed_dim dim model_dim emb_dim embedding_size max_source_positions "
    "max_2d_position_embeddings",
    96: "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner mlp_dim inner_dim",
    128: "max_position_embeddings n_positions max_target_positions",
    TOKENS: "vocab_size",
    0: "pad_token_id",
    1: "bos_token_id decoder_start_token_id",
}
FIELDS = {name: value for value, names in SMALL.items() for name in names.split()}


class Unusable(Exception):
    """A family that the census cannot judge, with the reason."""


def families() -> list[str]:
    """The names of every family of `transformers`."""
    return [name for name in MODEL_MAPPING_NAMES if name in transformers.CONFIG_MAPPING]


def shrink(config: Any) -> None:
    """Make a configuration, and those inside it, small, by the usual names of their fields."""
    for name, old in list(vars(config).items()):
        if hasattr(old, "to_dict") and name != "quantization_config":
            shrink(old)
        elif name in FIELDS and isinstance(old, int) and not isinstance(old, bool):
            with suppress(Exception):
                setattr(config, name, FIELDS[name])
        elif name == "layer_types" and isinstance(old, list) and old:
            other = next((kind for kind in old if kind != old[0]), old[0])
            config.layer_types = [old[0], other]
    config.use_cache = False


def build(family: str) -> Model:
    """A small model with eager attention. Weights are scaled by fan-in, so attention is far from uniform."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[family]()
    shrink(config)
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModel.from_config(config).parameters())
    if size > LARGEST:
        raise Unusable(f"it stays large: {size / 1e6:.0f} million parameters")
    model: Model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2 and weight.is_floating_point():
                weight.normal_(std=max(weight[0].numel(), 1) ** -0.5)
    return model.float().eval()


def guesses(model: Model) -> Iterator[Inputs]:
    """Inputs by the usual names of a model's arguments; several shapes are tried where families disagree."""
    takes = inspect.signature(model.forward).parameters
    config: Any = model.config
    vision = getattr(config, "vision_config", None) or config
    side = getattr(vision, "image_size", 32)
    side = side if isinstance(side, int) else 32
    image = torch.randn(BATCH, getattr(vision, "num_channels", 3) or 3, side, side)
    bins = getattr(config, "num_mel_bins", 16) or 16
    sound, mask = torch.randn(BATCH, bins, 128), torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, -LENGTH // 4 :] = 0
    known: dict[str, list[torch.Tensor]] = {
        "input_ids": [torch.randint(3, TOKENS - 9, (BATCH, LENGTH))],
        "attention_mask": [mask] if "input_ids" in takes else [],
        "decoder_input_ids": [torch.randint(3, TOKENS - 9, (BATCH, LENGTH // 2))],
        "pixel_values": [image],
        "input_values": [torch.randn(BATCH, 4000)],
        "input_features": [sound, sound.mT.contiguous()],
    }
    options = {name: values for name, values in known.items() if name in takes and values}
    most = max(map(len, options.values()), default=0)
    for choice in range(most):
        chosen = {name: values[min(choice, len(values) - 1)] for name, values in options.items()}
        yield chosen
        if "input_ids" in chosen and "pixel_values" in chosen:
            yield {name: value for name, value in chosen.items() if name != "pixel_values"}


def case(family: str) -> tuple[Model, Inputs, list[torch.Tensor]]:
    """A model, inputs that it accepts, and its results."""
    try:
        model = build(family)
    except Exception as error:
        raise Unusable(f"cannot be built small: {short(error)}") from error
    fault = "its inputs have unusual names"
    for inputs in guesses(model):
        try:
            results = outputs(model, inputs)
        except Exception as error:
            fault = f"does not run on guessed inputs: {short(error)}"
        else:
            if difference(outputs(model, inputs), results) > 1e-4:
                raise Unusable("its results change from run to run")
            return model, inputs, results
    raise Unusable(fault)


def outputs(model: Callable[..., Any], inputs: Inputs) -> list[torch.Tensor]:
    """The floating tensors that a call returns."""
    from fusepass.tools.sandbox import copied, named_tensors

    torch.manual_seed(1)
    return [t.clone() for t in named_tensors(dict(model(**copied(inputs)))).values()]


def difference(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """The largest difference, in units of each tensor's largest value; infinite for other results."""
    from fusepass.tools.trial import distance

    if len(got) != len(want):
        return float("inf")
    return max((distance(a, b, b) for a, b in zip(got, want, strict=True)), default=0.0)


def short(error: BaseException) -> str:
    """An error, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


# ---------------------------------------------------------------------------------------- counting sites

PRODUCTS = ("bmm", "baddbmm")
SOFTMAXES = ("_softmax", "_safe_softmax")
FUSED = ("scaled_dot_product", "flex_attention", "fusepass.attention")
LIGHT = frozenset("_to_copy clone _unsafe_view native_dropout getitem cat masked_fill copy where".split())
"""Operations that are light (`is_light`), besides those that torch itself calls views or pointwise."""


def name_of(node: torch.fx.Node) -> str:
    """The operation of a node, without its namespace and overload."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[-1] if schema else getattr(node.target, "__name__", node.op)


def is_light(node: torch.fx.Node) -> bool:
    """Does a node only move elements, or transform them one by one?"""
    target = node.target
    if name_of(node) in LIGHT:
        return True
    return isinstance(target, torch._ops.OpOverload) and (
        target.is_view or torch.Tag.pointwise in target.tags
    )


Neighbours = Callable[[torch.fx.Node], Sequence[torch.fx.Node]]


def reaches_product(start: torch.fx.Node, neighbours: Neighbours) -> bool:
    """Does a path through light operations lead to a batched matrix product?"""
    seen, todo = {start}, [start]
    while todo:
        for node in neighbours(todo.pop()):
            if name_of(node) in PRODUCTS:
                return True
            if node not in seen and is_light(node):
                seen.add(node)
                todo.append(node)
    return False


def is_softmax(node: torch.fx.Node) -> bool:
    """Is it a softmax, or an exponential divided by a sum?"""
    names = [name_of(n) for n in node.all_input_nodes]
    return name_of(node) in SOFTMAXES or (name_of(node) == "div" and names == ["exp", "sum"])


def written_out(graph: torch.fx.Graph) -> int:
    """The number of unfused attention sites in a graph."""
    return sum(
        is_softmax(node)
        and reaches_product(node, lambda n: n.all_input_nodes)
        and reaches_product(node, lambda n: list(n.users))
        for node in graph.nodes
    )


def fused_calls(graph: torch.fx.Graph) -> int:
    """The number of fused attention operators that a graph calls."""
    calls = (n for n in graph.nodes if n.op == "call_function" and n.target is not operator.getitem)
    return sum(any(name in str(node.target) for name in FUSED) for node in calls)


def counting(counts: Counter[str]) -> Compiler:
    """An inner backend that counts sites in the ATen graph and then runs it unchanged."""
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda gm, inputs: counted(counts, gm))


def inductor_passes(counts: Counter[str]) -> Compiler:
    """TorchInductor up to its lowering: its graph passes run, but no code is generated."""
    from torch._inductor.compile_fx import compile_fx

    def inner_compile(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        return counted(counts, gm)

    return lambda gm, inputs: compile_fx(gm, inputs, inner_compile=inner_compile)


def counted(counts: Counter[str], gm: torch.fx.GraphModule) -> Any:
    """The graph as a callable; its sites are counted."""
    from torch._functorch._aot_autograd.utils import make_boxed_func

    counts["sites"] += written_out(gm.graph)
    counts["calls"] += fused_calls(gm.graph)
    return make_boxed_func(gm.forward)


# ---------------------------------------------------------------------------------------- one family


def measure(family: str, inner: str, with_inductor: bool) -> Row:
    """One family's row. A family that cannot be judged has a `skipped` reason instead of numbers."""
    try:
        with torch.no_grad():
            model, inputs, expected = case(family)
            plain: Counter[str] = Counter()
            try:
                compiled(model, counting(plain), inputs)
            except Exception as error:
                raise Unusable(f"does not compile without the pass: {short(error)}") from error
            row: Row = {"family": family, "sites": plain["sites"]}
            row["inductor"] = by_inductor(model, inputs, plain) if with_inductor else None
            row |= timed(model, inputs, expected, inner)  # first, while the pass has nothing cached
            return row | by_fusepass(model, inputs, expected)
    except Unusable as reason:
        return {"family": family, "skipped": str(reason)}


#: What a fused call reads besides queries, keys and values, the cheapest first.
READS = ("nothing", "over keys", "computed over pairs", "stored over pairs")


def quality(family: str) -> Row:
    """What the fused calls of one family read, and their masks and biases over queries and keys."""
    from fusepass.compilation.backend import fusepass
    from fusepass.reports.collector import collect

    try:
        with torch.no_grad():
            model, inputs, _ = case(family)
            with collect() as collector:
                compiled(model, fusepass, inputs, options={"inner": "eager"})
    except Unusable as reason:
        return {"family": family, "skipped": str(reason)}
    terms = Counter((d.name, d.formula, d.stored) for site in collector.fused for d in site.dense)
    return {
        "family": family,
        "reads": dict(Counter(reads(site) for site in collector.fused)),
        "terms": [[*term, count] for term, count in terms.items()],
    }


def reads(site: Any) -> str:
    """What a fused call reads besides queries, keys and values: one of `READS`."""
    if site.dense:
        return READS[3] if any(d.stored for d in site.dense) else READS[2]
    over_keys = any(part.startswith(("key padding", "mask[", "bias[")) for part in site.kind.split(", "))
    return READS[1] if over_keys else READS[0]


def compiled(
    model: Model, backend: Any, inputs: Inputs, **options: Any
) -> tuple[list[torch.Tensor], Callable[..., Any]]:
    """A compiled model and its first results; nothing is reused from earlier runs."""
    torch._dynamo.reset()
    fast = torch.compile(model, backend=backend, **options)
    return outputs(fast, inputs), fast


def by_inductor(model: Model, inputs: Inputs, plain: Counter[str]) -> int | None:
    """The number of sites that TorchInductor's own patterns fuse; None if it fails."""
    counts: Counter[str] = Counter()
    try:
        compiled(model, inductor_passes(counts), inputs)
    except Exception:
        return None
    return counts["calls"] - plain["calls"]


def by_fusepass(model: Model, inputs: Inputs, expected: list[torch.Tensor]) -> Row:
    """What the pass leaves unfused, what it recognises, and the largest difference from eager."""
    from fusepass.compilation.backend import fusepass
    from fusepass.reports.collector import collect

    counts: Counter[str] = Counter()
    with collect() as collector:
        results, _ = compiled(model, fusepass, inputs, options={"inner": counting(counts)})
    return {
        "left": counts["sites"],
        "kinds": dict(Counter(site.kind for site in collector.fused)),
        "kernels": dict(Counter(site.kernel for site in collector.fused)),
        "reasons": dict(Counter(site.reason for site in collector.left)),
        "notes": collector.notes,
        "error": difference(results, expected),
    }


def timed(model: Model, inputs: Inputs, expected: list[torch.Tensor], inner: str) -> Row:
    """Seconds of the pass and of the whole compilation: the first call's time minus the second's."""
    from fusepass.compilation.backend import fusepass
    from fusepass.reports.collector import collect

    torch.compile(torch.neg, backend=inner)(torch.ones(8))  # loading at first use is not compilation
    gc.collect()  # nor is cleaning up after earlier compilations
    with collect() as collector:
        start = time.perf_counter()
        results, fast = compiled(model, fusepass, inputs, options={"inner": inner})
        first = time.perf_counter()
        outputs(fast, inputs)
        second = time.perf_counter()
    whole = (first - start) - (second - first)
    return {
        "pass_s": collector.seconds,
        "compile_s": whole,
        f"{inner}_error": difference(results, expected),
    }


# ---------------------------------------------------------------------------------------- processes


def in_child(pipe: Connection, family: str, inner: str, with_inductor: bool, only_quality: bool) -> None:
    """The body of a family's process, which leads a process group, so that its compilers end with it."""
    os.setsid()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        try:
            pipe.send(quality(family) if only_quality else measure(family, inner, with_inductor))
        except BaseException as error:
            pipe.send({"family": family, "failed": short(error)})


#: The share of the compile time above which it is measured with TorchInductor too.
LARGE = 0.05
#: The key in a row under which the seconds with TorchInductor (`SECONDS`) are kept.
INDUCTORS = "with Inductor"
SECONDS = ("pass_s", "compile_s")


def with_inductor_too(row: Row, options: argparse.Namespace) -> Row | None:
    """The row with the seconds under TorchInductor, if the share with another backend is large, or None."""
    large = not options.quality and row.get("sites") and share(row) > LARGE and INDUCTORS not in row
    if options.inner == "inductor" or options.no_inductor or not large:
        return None
    settings = {"inner": "inductor", "no_inductor": True}
    compared = in_process(row["family"], argparse.Namespace(**vars(options) | settings))
    return row | {INDUCTORS: {key: compared[key] for key in SECONDS}} if "sites" in compared else None


def in_process(family: str, options: argparse.Namespace) -> Row:
    """A family's row, measured in a separate process that is killed after the time limit."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "transformers", "fusepass.compilation.rewrite"])
    mine, theirs = context.Pipe(duplex=False)
    given = (theirs, family, options.inner, not options.no_inductor, options.quality)
    process = context.Process(target=in_child, args=given, daemon=False)
    process.start()
    theirs.close()
    try:
        if not mine.poll(options.timeout):
            return {"family": family, "failed": f"more than {options.timeout:g} s"}
        row: Row = mine.recv()
        process.join(10)
        return row
    except EOFError:
        process.join()
        return {"family": family, "failed": f"its process ended with code {process.exitcode}"}
    finally:
        process.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid or os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------------------------------- tables


def verdict(row: Row) -> str:
    """`skipped`, `failed`, `wrong`, `none` (no attention), `left` (some stay) or `fused`."""
    for state in ("skipped", "failed"):
        if state in row:
            return state
    errors = [value for name, value in row.items() if name.endswith("error")]
    if not max(errors) <= TOLERANCE:
        return "wrong"
    return "none" if not row["sites"] else "left" if row["left"] else "fused"


HEADS = (
    "family", "sites", "fused", "by Inductor alone", "recognised as", "kernels", "error", "pass", "share",
)  # fmt: skip


def share(seconds: Row) -> float:
    """The pass's share of the compile time, from a row or from its numbers under TorchInductor."""
    return float(seconds["pass_s"] / max(seconds["compile_s"], 1e-9))


def cells(row: Row) -> list[str]:
    """The table line of a judged family."""
    other = f"; {share(row[INDUCTORS]):.1%} with Inductor" if INDUCTORS in row else ""
    return [
        row["family"] + (" (WRONG)" if verdict(row) == "wrong" else ""),
        str(row["sites"]),
        str(row["sites"] - row["left"]),
        "?" if row["inductor"] is None else str(row["inductor"]),
        listed(row["kinds"]),
        listed(row["kernels"]),
        f"{max(value for name, value in row.items() if name.endswith('error')):.0e}",
        f"{row['pass_s']:.2f} s",
        f"{share(row):.1%}{other}",
    ]


def listed(counts: dict[str, int]) -> str:
    """Every label once, with its count."""
    return "; ".join(f"{label} ×{count}" for label, count in counts.items())


def totals(rows: list[Row]) -> str:
    """A summary in a few sentences."""
    states = Counter(map(verdict, rows))
    judged = [row for row in rows if "sites" in row]
    sites, left = (sum(row[key] for row in judged) for key in ("sites", "left"))
    asked = [row for row in judged if row["inductor"] is not None]
    theirs, of = (sum(row[key] for row in asked) for key in ("inductor", "sites"))
    shares = [share(row) for row in judged]
    others = [share(row[INDUCTORS]) for row in judged if INDUCTORS in row]
    lines = [
        f"{len(rows)} families: {len(judged)} could be judged, {states['none']} of these have no sites; "
        f"{states['wrong']} wrong, {states['failed']} failed.",
        f"fusepass fused {sites - left} of {sites} sites.",
    ]
    if asked:
        lines.append(f"TorchInductor alone fused {theirs} of {of}.")
    if shares:
        middle = sorted(shares)[len(shares) // 2]
        lines.append(f"The pass's share of the compile time: median {middle:.1%}, largest {max(shares):.1%}.")
    if others:
        lines.append(f"Of the {len(others)} largest with Inductor: at most {max(others):.1%}.")
    return "\n".join(lines)


def rich_table(rows: list[Row]) -> Table:
    """The table for a terminal."""
    colours = {"fused": "green", "left": "yellow", "wrong": "bold red"}
    table = Table(title="Attention sites of eager transformers models", header_style="bold")
    for head in HEADS:
        table.add_column(head, justify="left" if head in ("family", "recognised as", "kernels") else "right")
    for row in rows:
        if row.get("sites"):
            line = [escape(cell) for cell in cells(row)]
            line[2] = f"[{colours.get(verdict(row), 'white')}]{line[2]}[/]"
            table.add_row(*line)
    return table


def versions(inner: str) -> str:
    """The versions and the machine of the measurement."""
    from fusepass import __version__

    packages = f"fusepass {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return f"{packages}, Python {platform.python_version()}; {machine}; inner {inner}"


def without_paths(text: str) -> str:
    """A message without the folders of this machine, which mean nothing elsewhere."""
    return re.sub(r"(?<![\w:/])/(?:[\w.+-]+/)+", "", text)


def markdown(rows: list[Row], inner: str) -> str:
    """The table as a file."""
    text = ["# Census", "", f"Written by `python benchmarks/census.py`. {versions(inner)}.", ""]
    text += [f"- {line}" for line in totals(rows).splitlines()]
    judged = [row for row in rows if "sites" in row]
    text += ["", *table_lines(HEADS, [cells(row) for row in judged if row["sites"]])]
    stay = [(row["family"], reason, n) for row in judged for reason, n in row["reasons"].items()]
    for title, entries in (
        ("Sites that stay", [f"- {family} ×{n}: {reason}" for family, reason, n in stay]),
        ("No attention sites", [", ".join(row["family"] for row in judged if not row["sites"])]),
        ("Failed", [f"- {row['family']}: {without_paths(row['failed'])}" for row in rows if "failed" in row]),
        ("Not judged", [f"- {r['family']}: {without_paths(r['skipped'])}" for r in rows if "skipped" in r]),
    ):
        if any(entries):
            text += ["", f"## {title}", "", *entries]
    return "\n".join(text) + "\n"


#: The heading of the section of the file that `--quality` writes.
SECTION = "## What fused calls read over queries and keys"


def quality_section(rows: list[Row]) -> str:
    """The section of the file: how many calls read what, and the formulas of what varies over both."""
    judged = [row for row in rows if row.get("reads")]
    total = Counter[str]()
    for row in judged:
        total.update(row["reads"])
    lines = [
        SECTION,
        "",
        f"Written by `python benchmarks/census.py --quality`. {versions('eager')}.",
        "",
        f"{total.total()} fused calls of {len(judged)} families read, besides queries, keys and values:",
        "",
        *table_lines(READS, [[str(total[name]) for name in READS]]),
        "",
        "A tensor over keys is a padding or a bias of one row. What is computed over pairs is a formula of",
        "positions and of such tensors. On a CPU both become a mask; on a GPU FlexAttention computes them.",
        "What is stored over pairs comes from outside the graph, or is a product or a table lookup.",
        "",
    ]
    heads = ("family", "calls", "mask or bias", "stored", "formula")
    cells = [
        [row["family"], str(count), name, "yes" if stored else "no", f"`{formula}`"]
        for row in judged
        for name, formula, stored, count in row["terms"]
    ]
    return "\n".join([*lines, *table_lines(heads, cells)]) + "\n"


def table_lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)] + [
        "| " + " | ".join(line) + " |" for line in lines
    ]


def with_section(text: str, section: str) -> str:
    """The file with its section replaced, or added before the next heading at the end."""
    before, _, rest = text.partition(SECTION)
    after = rest.partition("\n## ")[2]
    return before.rstrip() + "\n\n" + section + (f"\n## {after}" if after else "")


# ---------------------------------------------------------------------------------------- command line


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="families (all)")
    parser.add_argument("--limit", type=int, help="only the first N families")
    parser.add_argument("--inner", default="inductor", help="the inner backend (%(default)s)")
    parser.add_argument(
        "--no-inductor",
        action="store_true",
        help="do not count what TorchInductor fuses alone, and do not measure its share",
    )
    parser.add_argument(
        "--quality", action="store_true", help="list only what fused calls read, with formulas"
    )
    parser.add_argument("--timeout", type=float, default=300, help="seconds per family (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time (%(default)s)")
    parser.add_argument("--out", type=Path, help="the file to write (for a whole run: benchmarks/census.md)")
    parser.add_argument(
        "--rows", type=Path, help="a file of JSON lines: rows in it are kept, new ones are appended"
    )
    options = parser.parse_args(argv)
    known = families()
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"unknown families: {', '.join(unknown)}; transformers has {', '.join(known)}")
    if options.out is None and not options.names and options.limit is None:
        options.out = HERE / "census.md"
    options.names = (options.names or known)[: options.limit]
    return options


def run(options: argparse.Namespace) -> list[Row]:
    """Measure every chosen family that has no row from an earlier run, with a progress bar."""
    past = options.rows.read_text().splitlines() if options.rows and options.rows.exists() else []
    done = {row["family"]: row for row in map(json.loads, past)}
    writing = Lock()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(options.names))

        def measured(name: str) -> Row:
            progress.update(task, description=name)
            row = done.get(name) or in_process(name, options)
            more = with_inductor_too(row, options)
            row = more or row
            if options.rows and (more or name not in done):
                with writing, options.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            progress.advance(task)
            return row

        with ThreadPoolExecutor(options.jobs) as pool:
            return list(pool.map(measured, options.names))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a family is wrong or failed."""
    options = arguments(argv)
    os.environ |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // options.jobs, 1)))
    rows = run(options)
    if options.quality:
        section = quality_section(rows)
        print(section)
        if options.out:
            options.out.write_text(with_section(options.out.read_text(), section))
        return 1 if any("failed" in row for row in rows) else 0
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(rich_table(rows))
    console.print(totals(rows), highlight=False)
    for row in rows:
        if problem := row.get("skipped") or row.get("failed"):
            kind = "not judged" if "skipped" in row else "FAILED"
            console.print(f"{row['family']}: {kind}: {problem}", highlight=False, markup=False)
    if options.out:
        _, heading, section = (options.out.read_text() if options.out.exists() else "").partition(SECTION)
        kept = heading + section.partition("\n## ")[0] if heading else ""
        text = markdown(rows, options.inner)
        options.out.write_text(with_section(text, kept.rstrip() + "\n") if kept else text)
    return 1 if any(verdict(row) in ("wrong", "failed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
