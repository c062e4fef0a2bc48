"""The `webdancer` command: reads the configuration, starts one program, turns what goes wrong into one line and an exit code.

    0 done · 1 a fault of the program · 2 what the caller gave is wrong (errors.UserError) · 130 Ctrl-C · 143 SIGTERM

Every program takes `--config FILE` (again for more files) and `key=value` overrides, and with `--dry-run` only prints what they come to,
with the memory that training will need.
Nothing heavy is imported here: a program's module is imported when its command is run.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from webdancer import cli_baselines, cli_evaluate
from webdancer.config import Config
from webdancer.errors import ConfigError, DataError, ServiceError, UserError, WebDancerError

DONE, FAULT, WRONG_USE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

FULL_DISK = ("No space left on device", "Disk quota exceeded")

terminated = threading.Event()
"""Set once SIGTERM has come."""

QUICKSTART_CONFIG = Path(__file__).resolve().parent.parent / "ray_configs" / "quickstart.yaml"

PROGRAMS: dict[str, tuple[str, str]] = {
    "quickstart": ("webdancer.start:quickstart", "the whole way on one machine: questions, trajectories, SFT, RL, evaluation, report"),
    "synthesize": ("webdancer.start:synthesize", "questions from the pages of the web: synthesize crawlqa, or synthesize e2hqa"),
    "sample": ("webdancer.start:sample", "demonstrations from the teacher, by rejection sampling"),
    "sft": ("webdancer.start:sft", "the warm start on demonstrations"),
    "rl": ("webdancer.start:rl", "DAPO on live rollouts"),
    "evaluate": ("webdancer.start:evaluate", "a model on held-out questions or a benchmark; two evaluations, or two judges, compared"),
}
"""Command -> (module:function, help). The function is `async run(config, telemetry, open_services)`; what it returns is shown last."""

TRAINING = ("quickstart", "sft", "rl")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = parse(arguments)
    terminated.clear()
    signal.signal(signal.SIGTERM, _on_sigterm)
    # A shell script's background job inherits an ignored SIGINT, and SIGTERM would be ignored with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return _exit_code(options.command, options)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    options, rest = parser.parse_known_args(_with_method(sys.argv[1:] if arguments is None else arguments))
    unknown = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]  # argparse leaves overrides after an option behind
    if hasattr(options, "benchmark"):
        options.overrides = cli_evaluate.named_overrides(options, options.overrides)
    return options


def _with_method(words: Sequence[str]) -> list[str]:
    """`synthesize e2hqa` says what `synthesize synthesis.method=e2hqa` does."""
    if list(words[:1]) == ["synthesize"] and len(words) > 1 and words[1] in ("crawlqa", "e2hqa"):
        return ["synthesize", *words[2:], f"synthesis.method={words[1]}"]
    return list(words)


def console_script() -> None:
    sys.exit(main())


def _exit_code(command: Callable[[argparse.Namespace], int | None], options: argparse.Namespace) -> int:
    try:
        code = command(options) or DONE
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("webdancer: stopped; the same command goes on where it was", file=sys.stderr)
        return TERMINATED if terminated.is_set() else INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except BaseException as error:
        known = _known_error(error)
        if known is None:
            raise
        print(f"webdancer: {_one_line(known)}", file=sys.stderr)
        return WRONG_USE if isinstance(known, UserError) else FAULT


def _known_error(error: BaseException) -> WebDancerError | None:
    """The error of ours in what was raised: itself, the cause of a remote task's error, or the first in a task group's."""
    if isinstance(error, BaseExceptionGroup):
        return next((known for known in map(_known_error, error.exceptions) if known is not None), None)
    cause = getattr(error, "cause", None)  # an error of a remote task is of the cause's class, but its text is a traceback
    if isinstance(cause, WebDancerError):
        return cause
    if isinstance(error, WebDancerError):
        return error
    if any(sign in str(error) for sign in FULL_DISK):  # from Python, safetensors or a remote actor
        return ServiceError(f"disk: must have room for what the run writes, got: {_one_line(error)[:300]}")
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    """SIGTERM, as `ray job stop` sends it, ends a program in the same orderly way as Ctrl-C."""
    terminated.set()
    signal.raise_signal(signal.SIGINT)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="webdancer", description="Reinforcement learning of web-searching agents.")
    parser.add_argument("--version", action=_PrintVersion)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (target, text) in PROGRAMS.items():
        program = _command(commands, name, text, _run_program, configured=True)
        program.set_defaults(target=target, plans=name in TRAINING, default_config=QUICKSTART_CONFIG if name == "quickstart" else None)
        if name == "evaluate":
            cli_evaluate.add_options(program)
            program.set_defaults(command=_evaluate)
    _add_model_commands(commands)
    _add_web_commands(commands)
    _add_config_commands(commands)
    submit = _command(commands, "submit", "send a program to a running Ray cluster as a job, and follow its log", _submit)
    submit.add_argument("--address", default=os.environ.get("RAY_ADDRESS", "http://127.0.0.1:8265"), help="dashboard of the head")
    submit.add_argument("--no-wait", action="store_true", help="return once the job is accepted")
    submit.add_argument("program", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="e.g. -- rl --config FILE key=value")
    scale = _command(commands, "scale", "give a run that goes on more or fewer rollout workers or tool actors", _scale)
    scale.add_argument("number", metavar="rollout=N|tools=N", help="so many rollout workers, or tool actors, from now on")
    scale.add_argument("--run-dir", type=Path, metavar="DIR", help="the run's; without it, the only run on the Ray at --address")
    scale.add_argument("--address", default=os.environ.get("RAY_ADDRESS", "auto"), help="HOST:PORT of the Ray (default: %(default)s)")
    scale.add_argument("--timeout", type=float, default=900.0, metavar="S", help="to wait until it has them (default: %(default)s)")
    _command(commands, "plan", "estimate the memory that training needs, and check it against what there is", _plan, configured=True)
    _command(commands, "doctor", "check this machine: versions, memory, disk, ports, accelerators", _doctor)
    return parser


def _add_model_commands(commands: Any) -> None:
    export = _command(commands, "export", "write the newest checkpoint as a Hugging Face directory", _export, configured=True)
    export.add_argument("--to", type=Path, required=True, metavar="DIR", help="must not exist yet")
    chat = _command(commands, "chat", "ask the agent questions at the terminal", _chat, configured=True)
    demo = _command(commands, "demo", "ask the agent questions on a small web page", _demo, configured=True)
    for asked in (chat, demo):
        asked.add_argument("--temperature", type=float, default=0.0, metavar="T", help="of sampling; 0: greedy (default: %(default)s)")
    demo.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines (default: %(default)s)")
    demo.add_argument("--port", type=int, default=7860, help="0: a free one (default: %(default)s)")
    base = _command(commands, "base-model", "make the tiny base model again from its recipe", _base_model)
    base.add_argument("--to", type=Path, required=True, metavar="DIR")
    text = "no tools, RAG, ReAct and trained models on one benchmark"
    cli_baselines.add_options(_command(commands, "baselines", text, _baselines, configured=True))


def _add_web_commands(commands: Any) -> None:
    web = commands.add_parser("web", help="the offline web").add_subparsers(required=True, metavar="build|serve")
    build = _command(web, "build", "a web of one's own pages or passages, or the encyclopedia's pages", _web_build, configured=True)
    build.add_argument("--from", type=Path, dest="source", metavar="PATH", help="JSONL, HTML or a crawl; without it, the encyclopedia")
    build.add_argument("--to", type=Path, required=True, metavar="DIR", help="must be new or empty")
    build.add_argument("--engine", choices=("fts5", "tantivy"), default="fts5", help="tantivy: for millions of passages (default: fts5)")
    serve = _command(web, "serve", "serve the encyclopedia, a folder of pages or a built web over HTTP", _web_serve, configured=True)
    serve.add_argument("--folder", type=Path, metavar="DIR", help="what to serve; without it, the encyclopedia")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines (default: %(default)s)")


def _add_config_commands(commands: Any) -> None:
    config = commands.add_parser("config", help="look at configurations").add_subparsers(required=True, metavar="show|diff|schema")
    _command(config, "show", "the resolved configuration", _config_show, configured=True)
    diff = _command(config, "diff", "where two configuration files differ, once resolved", _config_diff)
    diff.add_argument("first", type=Path)
    diff.add_argument("second", type=Path)
    _command(config, "schema", "every knob with its default and meaning, as YAML", _config_schema)


def _command(
    commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], int | None], *, configured: bool = False
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=run, default_config=None)
    if configured:
        parser.add_argument("--config", type=Path, action="append", default=[], metavar="FILE", help="YAML; later files win")
        parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
        parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="e.g. rollout.num_workers=8")
    return parser


class _PrintVersion(argparse.Action):
    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, help="print the version and stop", **options)

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        from webdancer import __version__

        print(f"webdancer {__version__}")
        parser.exit(DONE)


def _load_config(options: argparse.Namespace) -> Config:
    from webdancer.config import load

    files = options.config or ([options.default_config] if options.default_config else [])
    return load(files, options.overrides)


def _configured(options: argparse.Namespace) -> Config | None:
    """The configuration, or None when a dry run has printed it."""
    config = _load_config(options)
    if not options.dry_run:
        return config
    from webdancer.config_loading import resolved_yaml

    print(resolved_yaml(config), end="")
    return None


def _imported(target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _run_program(options: argparse.Namespace) -> None:
    if config := _configured(options):
        _run(config, options.target)
    elif options.plans:
        _print_plan(_load_config(options), before="# ")


def _evaluate(options: argparse.Namespace) -> None:
    cli_evaluate.check(options)
    if options.compare:
        print(cli_evaluate.compare(*options.compare))
    elif options.judge_agreement:
        if config := _configured(options):
            print(cli_evaluate.judge_agreement(options.judge_agreement, config))
    else:
        _run_program(options)


def _plan(options: argparse.Namespace) -> None:
    if config := _configured(options):
        _print_plan(config)


def _print_plan(config: Config, *, before: str = "") -> None:
    """In a dry run as comments, so that what is printed can be loaded; and there the model may still be missing."""
    try:
        plan = _imported("webdancer.plan:plan")(config)
    except DataError as error:
        if not before:
            raise
        print(f"{before}memory: not estimated ({_one_line(error)})")
        return
    for line in plan.lines:
        print(f"{before}{line}")
    plan.check()


def _run(config: Config, target: str, **settings: Any) -> None:
    """One program in a run directory of its own, over the services of a cluster; its module's `check` comes before anything is written."""
    from webdancer import run_directory
    from webdancer.telemetry import Telemetry

    module, _, name = target.partition(":")
    asyncio.run(_imported(f"{module}:check")(config, name))
    program = _imported(target)
    with run_directory.claim(config) as run_dir, Telemetry.open(run_dir, config) as telemetry:
        open_services = _imported("webdancer.cluster.launch:services")
        result = asyncio.run(program(config, telemetry, open_services, **settings))
        if result is not None:
            telemetry.say(str(result))


def _export(options: argparse.Namespace) -> None:
    if config := _configured(options):
        if options.to.exists():
            raise UserError(f"--to: must be a directory that does not exist yet, got {str(options.to)!r}")
        _run(config, "webdancer.start:export", to=options.to)


def _chat(options: argparse.Namespace) -> None:
    if config := _configured(options):
        _run(config, "webdancer.start:chat", temperature=_temperature(options))


def _demo(options: argparse.Namespace) -> None:
    if config := _configured(options):
        settings = {"host": options.host, "port": options.port, "temperature": _temperature(options)}
        _run(config, "webdancer.start:demo", **settings)


def _temperature(options: argparse.Namespace) -> float:
    temperature: float = options.temperature
    if not 0 <= temperature <= 2:
        raise UserError(f"--temperature: must be between 0 and 2, got {temperature:g}")
    return temperature


def _baselines(options: argparse.Namespace) -> int | None:
    config = _configured(options)
    return cli_baselines.run(options, config) if config else None


def _base_model(options: argparse.Namespace) -> None:
    _imported("webdancer.offline_web.base_model:make_base_model")(options.to)


def _web_build(options: argparse.Namespace) -> None:
    if config := _configured(options):
        from webdancer.offline_web.build import build_folder, build_web

        if options.source is not None:
            built = build_web(options.source, options.to, engine=options.engine)
            left_out = f", {built.num_without_text} without text left out" if built.num_without_text else ""
            print(f"{built.num_documents} documents in {options.to} ({built.seconds:.0f} s){left_out}")
            return
        num_pages = build_folder(options.to, seed=config.web.seed, num_entities=config.web.num_entities)
        print(f"{num_pages} pages in {options.to}")


def _web_serve(options: argparse.Namespace) -> None:
    if config := _configured(options):
        from webdancer.offline_web.server import serve
        from webdancer.offline_web.site import open_site

        site = open_site(seed=config.web.seed, num_entities=config.web.num_entities, directory=options.folder)
        serve(site, host=options.host, port=config.web.port)


def _submit(options: argparse.Namespace) -> int:
    program = options.program[1:] if options.program[:1] == ["--"] else options.program
    if not program or program[0] not in PROGRAMS:
        raise ConfigError(f"submit: must be followed by -- and one of {', '.join(PROGRAMS)}, got {' '.join(program)!r}")
    config = _load_config(parse(program))  # a wrong key is found here, not minutes later on the cluster
    wait = not options.no_wait
    code: int = _imported("webdancer.cluster.submit:submit")(program, address=options.address, run_dir=config.run_dir, wait=wait)
    return code


def _scale(options: argparse.Namespace) -> int:
    what, _, number = options.number.partition("=")
    if what not in ("rollout", "tools") or not number.isdecimal() or int(number) < 1:
        raise UserError(f"scale: must be rollout=N or tools=N with a whole number from 1, got {options.number!r}")
    live = _imported("webdancer.cluster.live_file:find_live")(options.run_dir) if options.run_dir is not None else None
    scale = _imported("webdancer.cluster.scaling:scale")  # it imports Ray, which reads then what `live` has put into the environment
    settings = {"live": live, "address": options.address, "timeout_s": options.timeout}
    return DONE if scale(what, int(number), **settings, say=functools.partial(print, flush=True)) else FAULT


def _doctor(options: argparse.Namespace) -> int:
    from webdancer.doctor import examine

    findings = examine()
    for finding in findings:
        print(finding.line)
    return DONE if all(finding.fine for finding in findings) else FAULT


def _config_show(options: argparse.Namespace) -> None:
    from webdancer.config_loading import config_hash, resolved_yaml

    config = _load_config(options)
    print(f"# {config_hash(config)}\n{resolved_yaml(config)}", end="")


def _config_diff(options: argparse.Namespace) -> None:
    from webdancer.config_loading import differences, load

    for key, (first, second) in differences(load([options.first]), load([options.second])).items():
        print(f"{key}: {first!r} -> {second!r}")


def _config_schema(options: argparse.Namespace) -> None:
    from webdancer.config_loading import schema_yaml

    print(schema_yaml(), end="")


if __name__ == "__main__":
    console_script()
