"""The command line: ``specc generate``, ``specc bench``, ``specc dump`` and ``specc doctor``.

Nothing here imports torch before a command needs it, so that ``--help`` and wrong arguments answer
at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import specc
from specc.errors import InputError, SpeccError

NOT_IDENTICAL = 1
REFUSED = 2
INTERRUPTED = 130

DUMP_PROMPT = "The capital of France is"
BENCH_PROMPT = (
    "Here is a list of words: river, stone, cloud, lantern, river, stone, cloud, window. "
    "Write the list again, one word on each line, and then write it backwards, one word on each line."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 where a check found something, 2 for a SpeccError."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except SpeccError as error:
        print(f"specc: error: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("specc: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specc", description="Compiled speculative decoding for stock Hugging Face models."
    )
    parser.add_argument("--version", action="version", version=f"specc {specc.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_bench(commands)
    _add_dump(commands)
    _add_doctor(commands)
    return parser


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser("generate", help="answer a prompt, streaming the text")
    _add_model(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt")
    prompt.add_argument("--prompt-file", metavar="F", help="a file that holds the prompt; - reads stdin")
    _add_draft(parser)
    _add_num_draft_tokens(parser)
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default 256")
    parser.add_argument("--system", metavar="TEXT", help="a system message, for chat models")
    parser.add_argument("--raw", action="store_true", help="feed the prompt without the chat template")
    parser.add_argument("--compare", action="store_true", help="then decode without speculation, and compare")
    parser.set_defaults(command=_generate)


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench", help="time a model's own generate, its speculation, and specc, side by side"
    )
    _add_model(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default=BENCH_PROMPT, metavar="TEXT", help="the prompt; there is one")
    prompt.add_argument("--prompt-file", metavar="F", help="a file that holds the prompt; - reads stdin")
    parser.add_argument("--raw", action="store_true", help="feed the prompt without the chat template")
    _add_draft(parser)
    parser.add_argument(
        "--num-draft-tokens",
        type=int,
        nargs="+",
        default=[4],
        metavar="N",
        help="tokens checked per step, one table row each (default 4)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed calls per row (default 5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default float32"
    )
    parser.add_argument("--json", metavar="F", help="write the result to this file, too")
    parser.set_defaults(command=_bench)


def _add_dump(commands: Any) -> None:
    parser = commands.add_parser("dump", help="write a model's graphs, pass by pass")
    _add_model(parser)
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--role",
        choices=("verify", "draft"),
        default="verify",
        help="verify: the graphs that read prompts and check drafts; draft: and the one that drafts",
    )
    _add_num_draft_tokens(parser)
    parser.set_defaults(command=_dump)


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="say what specc finds on this machine")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=_doctor)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="smollm2, a folder, a hub id, or a .gguf file")
    parser.add_argument("--no-inductor", action="store_true", help="run the graphs as captured")
    parser.add_argument("--quiet", action="store_true", help="do not announce what takes time")


def _add_draft(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--draft", default="ngram", metavar="ngram|MODEL", help="prompt lookup, or a smaller model"
    )


def _add_num_draft_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-draft-tokens",
        type=int,
        default=4,
        metavar="N",
        help="tokens checked per step: N - 1 drafts and the bonus token (default 4)",
    )


def _generate(arguments: argparse.Namespace) -> int:
    prompt = _prompt(arguments)
    _start(arguments)
    from specc import comparison, models

    with models.hushed_transformers():
        model, tokenizer = models.load(arguments.model, quiet=arguments.quiet)
        draft = arguments.draft
        if draft != "ngram":
            draft, _ = models.load(draft, quiet=arguments.quiet)
        task = comparison.Task(
            model,
            tokenizer,
            inputs=models.encode(tokenizer, prompt, system=arguments.system, raw=arguments.raw),
            draft=draft,
            num_draft_tokens=arguments.num_draft_tokens,
            max_new_tokens=arguments.max_new_tokens,
            options=_options(arguments),
        )
        streamed = comparison.stream(task, quiet=arguments.quiet)
        if not arguments.compare:
            print(comparison.summary(streamed), file=sys.stderr)
            return 0
        result = comparison.compare(task, streamed, quiet=arguments.quiet)
    print(result.table())
    return 0 if result.identical else NOT_IDENTICAL


def _bench(arguments: argparse.Namespace) -> int:
    """Where rounding cannot tell them apart, other tokens than the model's own are an exit code."""
    prompt = _prompt(arguments)
    _check_least(arguments, "max_new_tokens", 2)
    _check_least(arguments, "repeats", 1)
    _start(arguments)
    from specc import bench, models

    with models.hushed_transformers():
        model, tokenizer = _placed(arguments, arguments.model)
        inputs = models.encode(tokenizer, prompt, system=None, raw=arguments.raw)
        task = bench.Task(
            name=arguments.model,
            model=model,
            inputs={name: each.to(model.device) for name, each in inputs.items()},
            draft="ngram" if arguments.draft == "ngram" else _placed(arguments, arguments.draft)[0],
            blocks=arguments.num_draft_tokens,
            max_new_tokens=arguments.max_new_tokens,
            repeats=arguments.repeats,
            options=_options(arguments),
        )
        result = bench.run(task, quiet=arguments.quiet)
    print(result.table())
    if arguments.json:
        result.save(arguments.json)
    return 0 if result.identical or arguments.dtype != "float32" else NOT_IDENTICAL


def _placed(arguments: argparse.Namespace, name: str) -> tuple[Any, Any]:
    """A model where and how the arguments want it, and its tokenizer."""
    import torch

    from specc import models

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("this machine has no CUDA device: leave --device out")
    model, tokenizer = models.load(name, quiet=arguments.quiet)
    return model.to(arguments.device, getattr(torch, arguments.dtype)), tokenizer


def _check_least(arguments: argparse.Namespace, name: str, least: int) -> None:
    value = getattr(arguments, name)
    if value < least:
        raise InputError(f"--{name.replace('_', '-')} must be {least} at least, got {value}")


def _dump(arguments: argparse.Namespace) -> int:
    _start(arguments)
    from specc import models
    from specc.progress import stage

    with models.hushed_transformers():
        model, tokenizer = models.load(arguments.model, quiet=arguments.quiet)
        with stage("compiling and dumping", quiet=arguments.quiet):
            specc.generate(
                model,
                **models.encode(tokenizer, DUMP_PROMPT, system=None, raw=True),
                draft=model if arguments.role == "draft" else "ngram",
                num_draft_tokens=arguments.num_draft_tokens,
                # Enough for one step: the first token comes from reading the prompt.
                min_new_tokens=2,
                max_new_tokens=2,
                do_sample=False,
                options={**_options(arguments), "dump": arguments.output},
            )
    print(Path(arguments.output) / "index.md")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from specc import doctor

    report = doctor.examine()
    print(report.json() if arguments.json else report.text())
    return 1 if report.problems else 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"inductor": False} if arguments.no_inductor else {}


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt_file is None:
        return arguments.prompt
    if arguments.prompt_file == "-":
        return sys.stdin.read()
    try:
        return Path(arguments.prompt_file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the prompt file {arguments.prompt_file}: {error}") from error


def _start(arguments: argparse.Namespace) -> None:
    from specc.progress import stage

    with stage("starting PyTorch and Transformers", quiet=arguments.quiet):
        from transformers import AutoModelForCausalLM, TextStreamer  # noqa: F401

        from specc.pipeline import cpp_obstacle
    if not arguments.no_inductor:
        # It warns once, at the first call: here, where no stage has its line open.
        cpp_obstacle()
