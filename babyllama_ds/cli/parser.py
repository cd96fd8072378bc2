"""The command line's parser: what there is to type enters argparse, options leave.

A misspelt command, option or field is answered with what was meant.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from babyllama_ds import __version__
from babyllama_ds.cli import commands as does
from babyllama_ds.spec.base import NAME_PATTERN
from babyllama_ds.spec.evaluation import LEAST_TOKENS
from babyllama_ds.spec.explain import closest, did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse's, which suggests what a misspelt command or option was meant to be.

    argparse itself does so from Python 3.14 on, if asked, and for choices only.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.options: list[str] = []
        self.commands: Mapping[str, argparse.ArgumentParser] = {}
        super().__init__(*args, **settings)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As argparse's, remembering how options are spelt."""
        self.options += [name for name in names if str(name).startswith("--")]
        return super().add_argument(*names, **settings)

    def check_command(self, words: Sequence[str]) -> None:
        """Exit with a suggestion if the command is none of those that there are."""
        word = next((word for word in words if not word.startswith("-")), None)
        if word is not None and self.commands and word not in self.commands:
            hint = did_you_mean(word, self.commands)
            self.error(f"unknown COMMAND {word!r}; {hint}")


def parse(parser: Parser, words: Sequence[str] | None) -> argparse.Namespace:
    """Parse, with `KEY=VALUE` overrides allowed anywhere among the options.

    argparse alone takes them only right behind JOB in Python 3.11, and its intermixed mode knows
    no commands.
    """
    words = sys.argv[1:] if words is None else words
    parser.check_command(words)
    arguments, rest = parser.parse_known_args(words)
    overrides = [word for word in rest if "overrides" in arguments and not word.startswith("-")]
    unknown = [word for word in rest if word not in overrides]
    if unknown:
        command = next((word for word in words if word in parser.commands), "")
        here = parser.commands.get(command, parser)
        told = f"unrecognized arguments: {' '.join(unknown)}"
        here.error("; ".join([told, *_hints(here, unknown)]))
    if overrides:
        arguments.overrides = [*arguments.overrides, *overrides]
    return arguments


def _hints(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> Iterator[str]:
    """What unknown words were meant to be."""
    options = parser.options if isinstance(parser, Parser) else []
    for word in unknown:
        name = word.partition("=")[0]
        near = closest(name, options) if word.startswith("-") else None
        if near is not None:
            yield f"did you mean `{near}`?"
        elif "=" in word and word.startswith("-"):
            yield f"a field of the job has no dashes: {word.lstrip('-')}"


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """JOB, overrides and the place for runs: what every command about a job takes."""
    parser.add_argument("job", metavar="JOB", help="a job file, or the name of a shipped job")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],  # else argparse, where JOB is missing, asks for these too
        metavar="KEY=VALUE",
        help="override a field: student.training.epochs=4",
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of run directories (default: runs)"
    )


def command_line() -> Parser:
    """Every command with its options; the one that was typed is `command` of what was parsed."""
    parser = Parser(
        prog="babyllama-ds",
        description="Distil small LLaMA models from ensembles of teachers, on little text.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    parser.commands = commands.choices

    checker = commands.add_parser("check", help="validate a job and print it resolved")
    add_job_arguments(checker)
    checker.set_defaults(command=lambda args: does.check(args.job, args.overrides))

    _add_plan(commands.add_parser("plan", help="what a job will cost, with no GPU and no weights"))

    _add_doctor(commands.add_parser("doctor", help="whether this machine computes rightly"))

    runner = commands.add_parser(
        "run",
        help="run a job in this process alone (one rank)",
        description="Run a job in this process alone. On several ranks, one for each GPU of the "
        "machine: deepspeed --module babyllama_ds.cli.launch JOB [KEY=VALUE ...] [--runs DIR]",
    )
    add_job_arguments(runner)
    runner.set_defaults(command=lambda args: does.run(args.job, args.overrides, runs=args.runs))

    reporter = commands.add_parser("report", help="write a run's report anew")
    reporter.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory")
    reporter.set_defaults(command=lambda args: does.report(args.run_dir))

    gains = commands.add_parser("gains", help="gains of distillation over several runs")
    gains.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="run directories")
    gains.set_defaults(command=lambda args: does.gains(args.run_dirs))

    _add_export(commands.add_parser("export", help="a model or a whole run, for elsewhere"))

    _add_evaluate(
        commands.add_parser("evaluate", help="measure any causal LM on texts, pairs and tasks")
    )

    _add_generate(commands.add_parser("generate", help="let a model go on from a prompt"))

    _add_store(commands.add_parser("store", help="what runs share, who uses it, and its removal"))

    schema = commands.add_parser("schema", help="print the JSON schema of jobs")
    schema.add_argument(
        "--reference", action="store_true", help="print docs/jobs.md instead, the same in words"
    )
    schema.set_defaults(command=lambda args: does.schema(in_words=args.reference))
    return parser


def _add_plan(planner: argparse.ArgumentParser) -> None:
    add_job_arguments(planner)
    planner.add_argument(
        "--ranks",
        type=_positive_numbers,
        metavar="N,…",
        help="numbers of ranks to plan for (default: 1,2,4,8; with --measure: 1)",
    )
    planner.add_argument(
        "--gpu", metavar="CARD", help="the card of every rank, or `here`: refuse what cannot fit"
    )
    planner.add_argument(
        "--rate", metavar="SPEED", help="of one rank, measured: 25000 (tokens/s) or 40TFLOP/s"
    )
    planner.add_argument(
        "--tokens", type=_positive, metavar="N", help="tokens of the training text, if known"
    )
    planner.add_argument(
        "--measure",
        action="store_true",
        help="try every stage on this machine, on one rank, and reckon with what was measured",
    )
    planner.add_argument(
        "--seconds",
        type=_positive,
        metavar="N",
        help=f"with --measure: of steps, all stages together (default: {does.TRIAL_S})",
    )
    planner.add_argument(
        "--within",
        type=_above_zero,
        metavar="MINUTES",
        help="with --measure: fail where a run takes longer",
    )
    planner.add_argument("--json", action="store_true", help="print the plan as JSON")
    planner.set_defaults(command=lambda args: does.plan(args.job, args.overrides, args))


def _add_doctor(examiner: Parser) -> None:
    examiner.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of run directories (default: runs)"
    )
    examiner.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="what jobs will run on"
    )
    depth = examiner.add_mutually_exclusive_group()
    depth.add_argument(
        "--quick", action="store_true", help="versions, memory and disk alone; start no ranks"
    )
    depth.add_argument(
        "--compile", action="store_true", help="prove torch.compile too (about a minute more)"
    )
    examiner.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="look at these hosts too, over ssh"
    )
    examiner.add_argument(
        "--ssh-port", type=_positive, metavar="N", help="with --hostfile: where ssh listens"
    )
    examiner.options += ["--quick", "--compile"]  # a group's own, of which a parser hears nothing
    examiner.add_argument("--json", action="store_true", help="print the findings as JSON")
    examiner.set_defaults(command=does.doctor)


def _add_generate(speaker: argparse.ArgumentParser) -> None:
    speaker.add_argument("model", metavar="MODEL", help="a model's directory, a run's, or a hub id")
    speaker.add_argument(
        "prompts", type=_prompt, nargs="+", metavar="PROMPT", help="how its texts begin"
    )
    speaker.add_argument("--tokens", type=_positive, default=60, help="new tokens (default: 60)")
    speaker.add_argument("--number", type=_positive, default=1, help="texts of each (default: 1)")
    speaker.add_argument(
        "--temperature", type=_not_negative, default=0.8, help="0: the likeliest (default: 0.8)"
    )
    speaker.add_argument("--top-p", type=_share, default=0.95, help="default: 0.95")
    speaker.add_argument("--seed", type=_seed, default=0, help="default: 0")
    speaker.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    speaker.set_defaults(command=does.generate)


def _add_export(exporter: argparse.ArgumentParser) -> None:
    exporter.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory")
    exporter.add_argument(
        "--model",
        metavar="NAME",
        help="student, control or teachers/NAME (default: student)",
    )
    exporter.add_argument("--to", type=Path, metavar="DIR", help="write the model there")
    exporter.add_argument(
        "--push", metavar="ORG/NAME", help="put the model on the Hugging Face hub"
    )
    exporter.add_argument(
        "--private", action="store_true", help="with --push: a repository that only ORG sees"
    )
    exporter.add_argument(
        "--replace", action="store_true", help="with --push: in place of what is there"
    )
    exporter.add_argument(
        "--milestones",
        action="store_true",
        help="with --push: the model's milestones too, each as a branch (chck_1M, …)",
    )
    exporter.add_argument(
        "--float32",
        action="store_true",
        help="the model's weights in fp32: the same values, for programs that compute in the type "
        "that they find",
    )
    exporter.add_argument("--license", metavar="ID", help="for the card, as the hub names it: mit")
    exporter.add_argument("--language", metavar="CODE", help="of the text, for the card: en")
    exporter.add_argument(
        "--bundle", type=Path, metavar="PATH", help="copy the whole run, to a directory or a .tar"
    )
    exporter.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="report, metrics and job alone, of a run that need not be done",
    )
    exporter.set_defaults(command=does.export)


def _add_store(keeper: Parser) -> None:
    keeper.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of run directories (default: runs)"
    )
    what = keeper.add_mutually_exclusive_group()
    what.add_argument(
        "--remove",
        nargs="+",
        default=[],
        metavar="KEY",
        help="remove these, by the beginnings of their keys: what no run uses",
    )
    what.add_argument(
        "--remove-unused", action="store_true", help="remove all that no run in the folder uses"
    )
    keeper.options += ["--remove", "--remove-unused"]  # a group's own, as the doctor's
    keeper.set_defaults(command=does.store)


def _add_evaluate(judge: argparse.ArgumentParser) -> None:
    judge.add_argument("model", metavar="MODEL", help="a model's directory, a run's, or a hub id")
    judge.add_argument(
        "--pairs",
        type=_named_folder,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=DIR",
        help="a directory of *.jsonl, as of BLiMP, EWoK, entity tracking or COMPS: "
        "blimp=eval/blimp_filtered",
    )
    judge.add_argument(
        "--fine-tune",
        type=_named_suite,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=DIR",
        help="a directory of labelled tasks to fine-tune copies on: glue=eval/glue",
    )
    judge.add_argument(
        "--tasks",
        type=_name,
        nargs="+",
        metavar="TASK",
        help="of --fine-tune (default: all that have TASK.train.jsonl and TASK.valid.jsonl)",
    )
    judge.add_argument(
        "--max-tokens",
        type=_example,
        default=128,
        metavar="N",
        help="tokens of a task's example, of which longer ones are cut to so many (default: 128)",
    )
    judge.add_argument(
        "--seeds",
        type=_positive,
        default=1,
        metavar="N",
        help="trainings of each task, over which scores are means (default: 1)",
    )
    judge.add_argument(
        "--text",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="held-out text; its name without suffix is its domain",
    )
    judge.add_argument(
        "--length", type=_window, default=128, metavar="N", help="tokens in a window (default: 128)"
    )
    judge.add_argument(
        "--cleaning",
        choices=("none", "babylm"),
        default="none",
        help="of texts, as in jobs (default: none)",
    )
    judge.add_argument(
        "--prefix",
        choices=("none", "bos"),
        default="none",
        help="the token before each sentence (default: none, so its first is not scored)",
    )
    judge.add_argument(
        "--no-leading-space",
        action="store_false",
        dest="leading_space",
        help="encode sentences as at the start of a text, not as inside one",
    )
    judge.add_argument(
        "--batch-tokens",
        type=_positive,
        default=8192,
        metavar="N",
        help="tokens in one forward pass (default: 8192)",
    )
    judge.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    judge.add_argument(
        "--runs", type=Path, help="folder of run directories, whose store remembers measurements"
    )
    judge.add_argument("--json", action="store_true", help="print the measurement as JSON")
    judge.set_defaults(command=does.evaluate)


def _named_folder(word: str) -> tuple[str, Path]:
    """NAME=DIR, as argparse wants it."""
    name, _, folder = word.partition("=")
    if not name or not folder:
        raise _unlike(word, "NAME=DIR, for instance blimp=eval/blimp_filtered")
    return name, Path(folder).expanduser()


def _named_suite(word: str) -> tuple[str, Path]:
    """NAME=DIR with a name that jobs take too, as argparse wants it."""
    name, folder = _named_folder(word)
    return _name(name), folder


def _name(word: str) -> str:
    """What jobs take as a name, as argparse wants it."""
    if not re.fullmatch(NAME_PATTERN, word):
        raise _unlike(word, "a name of letters, digits, '.', '_' and '-'")
    return word


def _window(word: str) -> int:
    """Tokens in a window, at least one of them with one before it, as argparse wants it."""
    return _whole(word, least=2)


def _example(word: str) -> int:
    """Tokens of a task's example, as argparse wants it."""
    return _whole(word, least=LEAST_TOKENS)


def _seed(word: str) -> int:
    """A seed, as jobs take it, as argparse wants it."""
    number = _whole(word, least=0)
    if number >= 1 << 63:
        raise _unlike(word, "a whole number below 2**63")
    return number


def _prompt(word: str) -> str:
    """Text, as argparse wants it."""
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise _unlike(word, "text in UTF-8") from error
    return word


def _not_negative(word: str) -> float:
    """A number from 0 on, as argparse wants it."""
    number = _number(word)
    if not 0 <= number < math.inf:
        raise _unlike(word, "a number, 0 or more")
    return number


def _above_zero(word: str) -> float:
    """A number above 0, as argparse wants it."""
    number = _number(word)
    if not 0 < number < math.inf:
        raise _unlike(word, "a number above 0")
    return number


def _share(word: str) -> float:
    """A number above 0 and up to 1, as argparse wants it."""
    number = _number(word)
    if not 0 < number <= 1:
        raise _unlike(word, "a number above 0, at most 1")
    return number


def _positive(word: str) -> int:
    """A whole number above 0, as argparse wants it."""
    return _whole(word, least=1)


def _positive_numbers(words: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(word) for word in words.split(",")}))


def _whole(word: str, *, least: int) -> int:
    try:
        number = int(word)
    except ValueError:
        number = least - 1
    if number < least:
        raise _unlike(word, f"a whole number, {least} or more")
    return number


def _number(word: str) -> float:
    """The number; nan, which no limit lets through, where there is none."""
    try:
        return float(word)
    except ValueError:
        return math.nan


def _unlike(word: str, expected: str) -> argparse.ArgumentTypeError:
    """What argparse tells beside the option; of a `ValueError` it would name our function."""
    return argparse.ArgumentTypeError(f"got {word!r}, expected {expected}")
