"""The command line: `python -m fusepass {explain,verify,bench,export,optimize,doctor,run}`."""

import argparse
import json
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fusepass
from fusepass import __version__
from fusepass.host.config import PRECISIONS, Options, pass_options, refuse_others
from fusepass.host.kernel_names import KERNELS

MODEL_HELP = """\
MODEL is path/to/file.py:factory or package.module:factory. The factory takes no arguments and returns
(model, args) or (model, args, kwargs): the model, and what to call it with.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns 0 for success; 1 if a result is wrong (an export then writes nothing) or a library is missing; 2
    for a wrong command line, or a model or file that cannot be used.
    """
    arguments = _parser().parse_args(_with_report(list(sys.argv[1:] if argv is None else argv)))
    command: Callable[[argparse.Namespace], int] = arguments.command
    from fusepass.tools.targets import UsageError

    try:
        return command(arguments)
    except UsageError as error:
        print(f"fusepass: error: {error}", file=sys.stderr)
        return 2


def _with_report(argv: list[str]) -> list[str]:
    """Rewrite `run --report page.html SCRIPT` and `run --report SCRIPT` so that the parser can tell which."""
    if argv[:1] != ["run"] or "--report" not in argv:
        return argv
    at = argv.index("--report")
    before = [word for word in argv[1:at] if not word.startswith("-")]
    named = [word for word in argv[1:at] if word in ("--kernel", "--precision", "--inner", "--mode")]
    if len(before) > len(named):  # the script's own arguments
        return argv
    page = argv[at + 1] if argv[at + 1 : at + 2] and argv[at + 1].endswith((".html", ".htm")) else ""
    return [*argv[:at], f"--report={page}", *argv[at + 1 + bool(page) :]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fusepass", description="Finds hand-written attention and fuses it.")
    parser.add_argument("--version", action="version", version=f"fusepass {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _explain_parser(commands)
    _verify_parser(commands)
    _export_parser(commands)
    _optimize_parser(commands)
    about = "shows which kernels this machine can run, and why not the others"
    doctor = commands.add_parser("doctor", help=about, description=f"{about[0].upper()}{about[1:]}.")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(command=_doctor)
    _run_parser(commands)
    _bench_parser(commands)
    return parser


def _explain_parser(commands: Any) -> None:
    about = "shows every attention site of a model: what it is, and its kernel or why it stays"
    explain = commands.add_parser(
        "explain", help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=MODEL_HELP
    )
    _model_options(explain)
    explain.set_defaults(command=_explain)


def _verify_parser(commands: Any) -> None:
    about = "compares the errors of a fused and an eager model against float64, and their time and memory"
    verify = commands.add_parser(
        "verify", help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=MODEL_HELP
    )
    _model_options(verify)
    verify.add_argument("--grads", action="store_true", help="compare gradients as well")
    verify.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="timed runs (default: %(default)s); 0 measures neither time nor memory",
    )
    verify.set_defaults(command=_verify)


def _export_parser(commands: Any) -> None:
    about = "writes a model with its attention fused: ONNX, .pt2, or compiled ahead of time"
    export = commands.add_parser(
        "export",
        help=about,
        description=f"{about[0].upper()}{about[1:]}. --target, --opset and --no-verify are for .onnx files; "
        "--kernel, --precision and --validate are for .pt2 files.",
        epilog=MODEL_HELP,
    )
    export.add_argument("model", metavar="MODEL", help="file.py:factory or package.module:factory")
    export.add_argument("--to", required=True, metavar="FILE", help="the file to write, .onnx or .pt2")
    export.add_argument("--aoti", action="store_true", help="compile the .pt2 package ahead of time")
    _pass_options(export)
    export.add_argument("--dtype", help="float32, bfloat16, float16 or float64: casts model and arguments")
    export.add_argument("--device", help="such as cuda: moves model and arguments")
    export.add_argument(
        "--dynamic", action="store_true", help="let every size of every input vary, if the model allows it"
    )
    _onnx_options(export)
    export.set_defaults(command=_export)


def _optimize_parser(commands: Any) -> None:
    about = "fuses the attention of an ONNX model from any exporter"
    optimize = commands.add_parser("optimize", help=about, description=f"{about[0].upper()}{about[1:]}.")
    optimize.add_argument("source", metavar="IN", help="the ONNX model")
    optimize.add_argument("destination", metavar="OUT", nargs="?", help="where to write (default: IN)")
    _pass_options(optimize, about=False)
    _onnx_options(optimize)
    optimize.set_defaults(command=_optimize)


def _onnx_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        default="onnx",
        help="the runtime to write for: onnx, ort or tensorrt (default: %(default)s)",
    )
    parser.add_argument("--opset", type=int, help="version of the ai.onnx operators (default: 24)")
    parser.add_argument("--no-verify", action="store_true", help="do not check the file by running it")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="file.py:factory or package.module:factory")
    _pass_options(parser, compiles=True)
    parser.add_argument("--dtype", help="float32, bfloat16, float16 or float64: casts model and arguments")
    parser.add_argument("--device", help="such as cuda: moves model and arguments")
    parser.add_argument("--dynamic", action="store_true", help="compile for sizes that vary")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _pass_options(parser: argparse.ArgumentParser, compiles: bool = False, about: bool = True) -> None:
    """Add all options of the pass.

    Options that a command does not take are parsed too, but not listed, so that they are refused by name.
    """

    def option(name: str, help: str, shown: bool, **more: Any) -> None:
        parser.add_argument(name, default=None, help=help if shown else argparse.SUPPRESS, **more)

    option("--kernel", f"one of {', '.join(KERNELS)}, or a registered one (default: auto)", about)
    option("--precision", f"one of {', '.join(PRECISIONS)} (default: native)", about)
    option(
        "--validate", "compare every fused site with the original while compiling", about, action="store_true"
    )
    option("--inner", "what compiles the rewritten graph: a backend of torch.compile", compiles)
    option("--mode", "TorchInductor's mode, such as max-autotune", compiles)


def _run_parser(commands: Any) -> None:
    about = "runs a script with the pass in all its torch.compile(...) calls"
    usage = "fusepass run [options] [-m] SCRIPT [argument ...]"
    run = commands.add_parser("run", help=about, description=f"{about[0].upper()}{about[1:]}.", usage=usage)
    _pass_options(run)
    about_report = "afterwards print the table of sites to stderr, or write a page to FILE.html"
    run.add_argument("--report", nargs="?", const="", metavar="FILE.html", help=about_report)
    run.add_argument(
        "--profile", action="store_true", help="show the time of every fused site on the page; for short runs"
    )
    run.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    run.add_argument("script", metavar="SCRIPT")
    run.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="argument", help="passed to the script unchanged"
    )
    run.set_defaults(command=_run)


BENCH_HELP = """\
examples:
  python -m fusepass bench                         everything; results in bench.csv
  python -m fusepass bench --variants causal,window --lengths 1024,4096 --head-dims 128
  python -m fusepass bench --profile               measure this machine for `auto`; kept in the user's cache
  python -m fusepass bench --read bench.csv --plot pictures
"""


def _bench_parser(commands: Any) -> None:
    about = "times attention: eager, compiled, fused, and written by hand as calls of a library"
    parser = commands.add_parser(
        "bench",
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=BENCH_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--variants", default="all", help="kinds of attention, separated by commas (default: %(default)s)")
    option("--lengths", default="128,256,512,1024,2048,4096,8192,16384", help="default: %(default)s")
    option("--head-dims", default="64,128,256", help="head sizes (default: %(default)s)")
    option("--modes", default="forward,training", help="default: %(default)s")
    option("--contenders", help="from eager, compile, auto, hand, and names of kernels, separated by commas")
    option("--dtype", default="bfloat16", help="default: %(default)s")
    option("--device", help="cuda or cpu (default: cuda if there is a GPU)")
    option("--tokens", type=int, default=16384, help="batch times length (default: %(default)s)")
    option("--width", type=int, default=2048, help="heads times head size (default: %(default)s)")
    option("--repeats", type=int, default=20, help="timed runs (default: %(default)s)")
    option(
        "--workers",
        type=int,
        default=0,
        help="processes that compile (default: 1; several disturb each other's times)",
    )
    option("--limit", type=float, help="start no new measurement after this many seconds")
    option("--out", type=Path, default=Path("bench.csv"), help="file of the results (default: %(default)s)")
    option("--read", type=Path, nargs="+", help="measure nothing, and read these results instead")
    option("--plot", type=Path, help="folder to write pictures to")
    option("--markdown", type=Path, help="page to write the results to, as a table")
    option("--profile", action="store_true", help="fit the cost model that `auto` uses on this machine")
    option(
        "--profile-to", type=Path, help="file to write the profile to (default: in the user's cache folder)"
    )
    parser.set_defaults(command=_bench)


def _settings(arguments: argparse.Namespace, check: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """The options on a command line, checked."""
    from fusepass.tools.targets import UsageError

    given = {name: getattr(arguments, name) for name in Options.names()}
    settings = {name: value for name, value in given.items() if value is not None}
    try:
        check(settings)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    return settings


def _explain(arguments: argparse.Namespace) -> int:
    from fusepass.tools.explanation import explain
    from fusepass.tools.targets import load

    settings = _settings(arguments, Options.of)
    target = load(arguments.model, arguments.dtype, arguments.device)
    explanation = explain(
        target.model,
        *target.args,
        fusepass_options=settings,
        fusepass_dynamic=arguments.dynamic or None,
        **target.kwargs,
    )
    _show(explanation, arguments.json)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from fusepass.tools.targets import UsageError, load
    from fusepass.tools.verification import Unsteady, verify

    settings = _settings(arguments, Options.of)
    target = load(arguments.model, arguments.dtype, arguments.device)
    try:
        verification = verify(
            target.model,
            *target.args,
            fusepass_options=settings,
            fusepass_dynamic=arguments.dynamic or None,
            fusepass_grads=arguments.grads,
            fusepass_repeats=arguments.repeats,
            **target.kwargs,
        )
    except Unsteady as error:
        raise UsageError(str(error)) from error
    _show(verification, arguments.json)
    return 0 if verification.ok else 1


def _export(arguments: argparse.Namespace) -> int:
    import torch

    from fusepass.tools.targets import UsageError, load

    suffix = Path(arguments.to).suffix
    if suffix not in (".onnx", ".pt2") or (arguments.aoti and suffix != ".pt2"):
        raise UsageError(
            f"--to {arguments.to!r}: expected a name that ends in "
            f"{'.pt2, because of --aoti' if arguments.aoti else '.onnx, or in .pt2'}"
        )
    taker = "export_onnx" if suffix == ".onnx" else "compile_aoti" if arguments.aoti else "export_pt2"
    settings = _settings(arguments, lambda given: _check_options(taker, given))
    target = load(arguments.model, arguments.dtype, arguments.device)
    model = target.model
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"model {arguments.model!r}: export takes a torch.nn.Module")
    given: dict[str, Any] = {"kwargs": target.kwargs}
    if arguments.dynamic:
        given["dynamic_shapes"] = _all_dynamic(target.args, target.kwargs)
    if suffix == ".pt2":
        write = fusepass.compile_aoti if arguments.aoti else fusepass.export_pt2
        return _reported(lambda _: write(model, target.args, arguments.to, **given, **settings), arguments)
    given |= {"target": arguments.target, "opset": arguments.opset, "verify": not arguments.no_verify}
    return _reported(
        lambda say: fusepass.export_onnx(model, target.args, arguments.to, progress=say, **given), arguments
    )


def _all_dynamic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The `dynamic_shapes` with which every dimension of every tensor may vary, if the model allows it."""
    import torch

    auto = torch.export.Dim.AUTO

    def each(leaf: Any) -> Any:
        return dict.fromkeys(range(leaf.dim()), auto) if isinstance(leaf, torch.Tensor) else None

    shapes = torch.utils._pytree.tree_map(each, (args, kwargs))
    return shapes[1] if not args else shapes[0] if not kwargs else (*shapes[0], *shapes[1].values())


def _check_options(function: str, given: dict[str, Any]) -> None:
    """Check the options for a function."""
    if function.endswith("_onnx"):
        refuse_others(function, given, ())
    else:
        pass_options(function, given)


def _optimize(arguments: argparse.Namespace) -> int:
    _settings(arguments, lambda given: _check_options("optimize_onnx", given))
    return _reported(
        lambda say: fusepass.optimize_onnx(
            arguments.source,
            arguments.destination or arguments.source,
            target=arguments.target,
            opset=arguments.opset,
            verify=not arguments.no_verify,
            progress=say,
        ),
        arguments,
    )


def _reported(write: Callable[[Callable[[str], None]], Any], arguments: argparse.Namespace) -> int:
    """Write a file, with progress on a terminal; returns the exit status.

    It is 1 if the file would compute something else than the original, or if a library is missing.
    """
    from rich.console import Console
    from rich.markup import escape

    from fusepass.tools.targets import UsageError

    try:
        with Console(stderr=True).status("starting") as status:
            report = write(lambda step: status.update(escape(step)))
    except ValueError as error:
        raise UsageError(str(error)) from error
    except (ImportError, RuntimeError) as error:
        print(f"fusepass: error: {error}", file=sys.stderr)
        return 1
    _show(report, arguments.json)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from fusepass.tools.doctor import diagnose

    _show(diagnose(), arguments.json)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from fusepass.tools.bench.cli import command

    return command(arguments)


def _run(arguments: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from fusepass.compilation.autoenable import enabled
    from fusepass.reports.collector import collect, render, summary
    from fusepass.reports.page import page
    from fusepass.tools.targets import UsageError

    settings, script = _settings(arguments, lambda given: _check_options("enable", given)), arguments.script
    if not arguments.module and not Path(script).is_file():
        raise UsageError(
            f"cannot read {script!r}: there is no such file; expected a Python script, or -m MODULE"
        )
    place = None if not arguments.report else Path(arguments.report)
    if arguments.profile and place is None:
        raise UsageError("--profile shows times on a page: expected --report FILE.html as well")
    if place is not None and not place.parent.is_dir():
        raise UsageError(f"cannot write {arguments.report!r}: there is no folder {str(place.parent)!r}")
    console, began = Console(stderr=True), time.perf_counter()
    profiler = torch.profiler.profile() if arguments.profile else None
    with collect() as collector, enabled(**settings):
        try:
            if profiler is not None:
                profiler.start()
            _run_as_main(script, arguments.module, arguments.arguments)
        finally:
            if arguments.report == "":
                render(collector, console)
            else:
                console.print(f"fusepass: {summary(collector)}", highlight=False, markup=False)
            if place is not None:
                seconds = time.perf_counter() - began
                times = None if profiler is None else _stopped(profiler)
                place.write_text(page(collector, Path(script).name, seconds, times), encoding="utf-8")
                console.print(f"fusepass: report in {place}", highlight=False, markup=False)
    return 0


def _stopped(profiler: Any) -> Any:
    """Stop a profiler; returns what it saw of every fused site."""
    from fusepass.reports.page import range_times

    profiler.stop()
    return range_times(profiler.key_averages())


def _run_as_main(script: str, module: bool, arguments: list[str]) -> None:
    """Run the script as `python SCRIPT argument ...` or `python -m MODULE argument ...` would."""
    sys.argv = [script, *arguments]
    if module:
        sys.path.insert(0, "")
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(script).resolve().parent))
        runpy.run_path(script, run_name="__main__")


def _show(result: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
        return
    from rich.console import Console

    width = None if sys.stdout.isatty() else 140
    Console(width=width).print(result)


if __name__ == "__main__":
    sys.exit(main())
