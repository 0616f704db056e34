"""Seven small transformers with hand-written attention, compiled with fusepass and compared with eager.

    python examples/demo.py                       all of them, in a few minutes on two CPU cores
    python examples/demo.py --models llama bert   only these
    python examples/demo.py --inner inductor      generate code instead of just running the rewritten graph

The models have the usual architectures, few layers and random weights: nothing is downloaded. "before" is the
inner compiler alone; "after" is the same compiler on the graph that fusepass has rewritten.
"""

import argparse
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

import fusepass

WIDTH, HEADS, LAYERS, VOCABULARY = 256, 4, 2, 1000
BATCH, LENGTH = 2, 1024

Case = tuple[torch.nn.Module, dict[str, Any]]

LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": WIDTH // HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
}
BERT_LIKE = {**LLAMA_LIKE, "num_key_value_heads": HEADS}


def tokens(length: int = LENGTH) -> torch.Tensor:
    """Random text."""
    return torch.randint(3, VOCABULARY, (BATCH, length))


def build(config: transformers.PretrainedConfig) -> torch.nn.Module:
    """A model with eager attention. Its weights are scaled by fan-in: with the usual small ones, attention is
    nearly uniform, and a wrong mask would go unnoticed."""
    config.use_cache = False
    model: torch.nn.Module = transformers.AutoModel.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.normal_(std=weight[0].numel() ** -0.5)
    return model.eval()


def gpt2() -> Case:
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=LENGTH, vocab_size=VOCABULARY
    )
    return build(config), {"input_ids": tokens()}


def llama() -> Case:
    return build(transformers.LlamaConfig(**LLAMA_LIKE)), {"input_ids": tokens()}


def mistral() -> Case:
    config = transformers.MistralConfig(**LLAMA_LIKE, sliding_window=LENGTH // 4)
    return build(config), {"input_ids": tokens()}


def gemma2() -> Case:
    config = transformers.Gemma2Config(**LLAMA_LIKE, sliding_window=LENGTH // 4, attn_logit_softcapping=30.0)
    return build(config), {"input_ids": tokens()}


def t5() -> Case:
    config = transformers.T5Config(
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=2 * WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        vocab_size=VOCABULARY,
    )
    return build(config), {"input_ids": tokens(), "decoder_input_ids": tokens(LENGTH // 2)}


def bert() -> Case:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, -LENGTH // 3 :] = 0
    return build(transformers.BertConfig(**BERT_LIKE)), {"input_ids": tokens(), "attention_mask": mask}


def vit() -> Case:
    config = transformers.ViTConfig(**BERT_LIKE, image_size=256, patch_size=8)
    return build(config), {"pixel_values": torch.randn(BATCH, 3, 256, 256)}


CASES: dict[str, tuple[str, Callable[[], Case]]] = {
    "gpt2": ("GPT-2", gpt2),
    "llama": ("Llama, grouped heads", llama),
    "mistral": ("Mistral, window", mistral),
    "gemma2": ("Gemma-2, softcap", gemma2),
    "t5": ("T5, encoder and decoder", t5),
    "bert": ("BERT, padded", bert),
    "vit": ("ViT", vit),
}


@dataclass(frozen=True)
class Row:
    """One model's line of the table."""

    title: str
    verification: Any

    def cells(self) -> list[str]:
        verified, costs = self.verification, self.verification.costs
        fused = [site for site in verified.sites if site.fused]
        whole = len(fused) == len(verified.sites)
        colour = "bold red" if not verified.ok else "green" if whole else "yellow"
        return [
            self.title,
            f"[{colour}]{len(fused)}/{len(verified.sites)}[/]",
            counted(site.kind or "not recognised" for site in verified.sites),
            counted(site.kernel or "stays" for site in verified.sites),
            f"{verified.difference:.0e}" + ("" if verified.ok else " [bold red]WRONG[/]"),
            f"{costs['inner'].milliseconds:.0f} → {costs['fused'].milliseconds:.0f} ms",
            f"{megabytes(costs['inner'].peak_bytes)} → {megabytes(costs['fused'].peak_bytes)} MB",
        ]


def counted(labels: Any) -> str:
    """Every label once, with its count."""
    return "\n".join(f"{escape(label)} [dim]×{count}[/]" for label, count in Counter(labels).items())


def megabytes(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e6:.0f}"


def table(rows: list[Row], inner: str, setting: str) -> Table:
    """The table for the terminal."""
    grid = Table(title=f"Attention in eager transformers models, {setting}", header_style="bold")
    grid.caption = (
        f"before → after: {inner} alone → {inner} with fusepass. Error: largest difference from eager,\n"
        "relative to the largest output; each result was also checked against a float64 run of the model."
    )
    kernels = {site.kernel for row in rows for site in row.verification.sites}
    if "flex" in kernels and inner != "inductor":
        grid.caption += (
            f"\nFlexAttention is one kernel under --inner inductor only; under {inner} it is plain math."
        )
    grid.caption_justify = "left"
    for head in ("model", "fused", "recognised as", "kernel"):
        grid.add_column(head)
    for head in ("error", "time", "peak memory"):
        grid.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        grid.add_row(*row.cells(), end_section=True)
    return grid


def check(build_case: Callable[[], Case], chosen: argparse.Namespace) -> Any:
    """Build a model, and compare it fused and unfused."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, inputs = build_case()
    dtype = getattr(torch, chosen.dtype)
    model.to(chosen.device, dtype)
    for name, tensor in inputs.items():
        inputs[name] = tensor.to(chosen.device, dtype if tensor.is_floating_point() else None)
    with torch.no_grad():
        options = {"inner": chosen.inner, "kernel": chosen.kernel}
        return fusepass.verify(model, **inputs, fusepass_options=options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    inner = os.environ.get("FUSEPASS_DEMO_INNER", "aot_eager")
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES), metavar="MODEL")
    parser.add_argument("--inner", default=inner, help="what compiles the rewritten graph (%(default)s)")
    parser.add_argument("--kernel", default="auto", help="the backend's option of this name (%(default)s)")
    parser.add_argument("--device", default="cuda" if gpu else "cpu", help="(%(default)s)")
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32", help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def main() -> int:
    """Run the cases; 1 if a result was wrong."""
    options = arguments()
    logging.disable(logging.WARNING)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    rows = []
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(options.models))
        for name in options.models:
            title, build_case = CASES[name]
            progress.update(task, description=title)
            rows.append(Row(title, check(build_case, options)))
            progress.advance(task)
    if options.json:
        print(json.dumps({row.title: row.verification.to_json() for row in rows}, indent=2))
    else:
        console = Console(width=None if sys.stdout.isatty() else 132)
        console.print(table(rows, options.inner, f"{options.device}, {options.dtype}"))
        sites = [site for row in rows for site in row.verification.sites]
        console.print(
            f"{sum(site.fused for site in sites)} of {len(sites)} attention sites fused", style="bold"
        )
        for note in dict.fromkeys(note for row in rows for note in row.verification.collector.notes):
            console.print(f"note: {note}", style="yellow", highlight=False, markup=False)
    return 0 if all(row.verification.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
