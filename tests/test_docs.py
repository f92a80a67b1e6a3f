"""README and docs/: Python blocks run, commands parse, links and paths exist, generated numbers are
those of their sources.
"""

import ast
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
import textwrap
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from training import tiny

from benchmarks import gpu_proof, report, suite
from em_kernels import cli, reference

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import plans  # noqa: E402

FILES = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in FILES}
NOT_RUN = {  # reasons, by page, of the blocks that no test here can run
    "benchmarks.md": ["installs what is measured beside ours"],
    "evidence.md": ["takes half an hour a run"],
    "measuring.md": ["the 7B needs a GPU or days"],
    "reproducing.md": [*["the 7B needs a GPU or days"] * 2, "takes hours"],
    "using.md": ["vllm needs a GPU", "vllm needs a GPU", "llama.cpp is not a Python package"],
}
OTHERS_FLAGS = {"--no-build-isolation", "--max-lora-rank"}  # pip's and vLLM's, named in the text


class Block(NamedTuple):
    page: str
    kind: str
    text: str
    not_run: str  # the reason, or empty


def blocks():
    fence = r"(?:<!-- not run here: ([^\n]*) -->\n)?^( *)```(\w*)\n(.*?)^\2```$"
    for page, text in PAGES.items():
        for why, _, kind, body in re.findall(fence, text, re.M | re.S):
            yield Block(page, kind, textwrap.dedent(body), why)


BLOCKS = list(blocks())
TEXTS = {b.text: b for b in BLOCKS if b.kind == "python"}  # a text may be on two pages
PYTHON = [pytest.param(block, id=block.page) for block in TEXTS.values()]


def commands():
    """Yield (page, words) for each shell command outside blocks marked as not run."""
    for block in BLOCKS:
        if block.kind == "bash" and not block.not_run:
            for line in block.text.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield block.page, words
        if block.kind == "console":
            for line in re.findall(r"^\$ (.*)$", block.text, re.M):
                yield block.page, shlex.split(line, comments=True)


COMMANDS = list(commands())
SUITE = ["python", "-m", "benchmarks"]
LAUNCHERS = {"accelerate": launch_command_parser, "torchrun": get_args_parser}
OURS = [
    pytest.param(words, id=f"{page} {shlex.join(words)}")
    for page, words in COMMANDS
    if words[0] in ("em-kernels", *LAUNCHERS) or words[:3] == SUITE
]


def test_every_block_is_of_a_known_kind():
    assert {block.kind for block in BLOCKS} <= {"python", "bash", "console", "mermaid"}
    assert sum(text.count("```") for text in PAGES.values()) == 2 * len(BLOCKS)
    assert len(PYTHON) > 5 and len(OURS) > 30


def test_what_is_not_run_is_listed():
    marked = {}
    for block in BLOCKS:
        if block.not_run:
            marked.setdefault(block.page, []).append(block.not_run)
    assert marked == NOT_RUN


# Python


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Make a folder with runs/one and runs/adapters: ten updates of a tiny model each."""
    place = tmp_path_factory.mktemp("docs")
    model = tiny.save_tiny(place / "model")
    for name, mode in (("one", "full"), ("adapters", "lora")):
        short = tiny.PLAIN.model_copy(update={"max_new_tokens": 3})
        changes = {"steps": 10, "rollouts": 2, "sampling": short, "save_at": (5,), "mode": mode}
        tiny.run(tiny.settings(model, place / "runs" / name, **changes))
    return place


@pytest.mark.parametrize("block", PYTHON)
def test_python_runs(block, runs, monkeypatch):
    monkeypatch.chdir(runs)
    names = {"__name__": "__main__"}
    exec(compile(block.text, block.page, "exec"), names)
    for name in {"hidden", "weight"} & names.keys():
        if names[name].requires_grad:
            assert names[name].grad.isfinite().all()
    if "weight" in names and names["weight"].requires_grad:
        assert names["weight"].grad.abs().sum() > 0


@pytest.mark.parametrize("block", PYTHON)
def test_python_uses_what_it_imports(block):
    tree = ast.parse(block.text)
    imported = [a.asname or a.name for n in ast.walk(tree) for a in getattr(n, "names", [])]
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert {name.split(".")[0] for name in imported} <= used


# Commands


class Parsed(BaseException):
    """Raised once a command has parsed its arguments; no Exception, as commands catch those."""


@pytest.fixture
def only_parsed(monkeypatch):
    """Replace the first step of every command after parsing by raising Parsed."""
    from benchmarks import compile_report
    from em_kernels import commands
    from em_kernels.training.evaluation import task

    for name in ("data", "demo", "eval", "fetch_demo", "merge", "plan", "report", "study", "train"):
        importlib.import_module(f"em_kernels.commands.{name}")

    def stop(*_, **__):
        raise Parsed

    def train(config, **_):
        config.check_complete()
        raise Parsed

    monkeypatch.setattr(commands.train, "train", train)
    # No results of an earlier evaluation are read.
    monkeypatch.setattr(commands.eval, "read_results", lambda _: None)
    for module, name in (
        (commands.plan, "open_config"),
        (commands.data, "read_problems"),
        (task.TaskSettings, "problems"),
        (commands.eval, "evaluate"),
        (commands.eval, "regrade"),
        (commands.study, "run_study"),
        (commands.report, "write_report"),
        (commands.report, "model_logits"),
        (commands.merge, "merge"),
        (commands.demo, "run_demo"),
        (commands.fetch_demo, "fetch_demo"),
        (compile_report, "report"),
        (report, "write"),
    ):
        monkeypatch.setattr(module, name, stop)
    from benchmarks import inputs

    monkeypatch.setattr(suite, "run", stop)
    monkeypatch.setattr(inputs, "calibration", stop)


@pytest.mark.parametrize("words", OURS)
def test_command_parses(words, only_parsed, runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)  # --resume and --config want a run
    arguments = words[1:]
    if words[0] in LAUNCHERS:
        own = arguments[arguments[0] == "launch" :]
        asked = LAUNCHERS[words[0]]().parse_args(own)
        assert asked.module and asked.training_script == "em_kernels.cli"
        arguments = asked.training_script_args
    if arguments == ["info"]:
        assert cli.main(arguments) == 0
        return
    try:
        code = suite.main(words[3:]) if words[:3] == SUITE else cli.main(arguments)
    except Parsed:
        return
    except SystemExit as error:
        code = error.code
    pytest.fail(f"exit code {code}: {capsys.readouterr().err}")


def test_other_commands_are_known():
    """make targets and pip extras exist; a block with any other command is marked as not run."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    known = set(re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
    for page, words in COMMANDS:
        while "=" in words[0]:  # of the environment
            words = words[1:]
        if words[0] == "make":
            assert words[1] in targets, page
        elif words[:2] == ["pip", "install"]:
            extras = re.findall(r"\[(.*?)\]", " ".join(words))
            asked = {extra for found in extras for extra in found.split(",")}
            assert asked <= known, page
        else:
            ours = words[0] in ("em-kernels", *LAUNCHERS) or words[:3] == SUITE
            assert ours, (page, words)


def test_merge_and_report_do_what_the_pages_say(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    assert cli.main(["merge", "runs/adapters", "--output", "merged"]) == 0
    assert (runs / "merged" / "config.json").exists()
    assert cli.main(["report", "runs/one", "--no-models"]) == 0
    assert (runs / "runs" / "one" / "report.html").exists()
    for name in ("config.yaml", "metrics.jsonl", "rollouts.jsonl", "checkpoints/step-00010"):
        assert (runs / "runs" / "one" / name).exists()


@pytest.fixture(scope="module")
def flags():
    """Return the flags in the --help of all commands, the benchmark suite and make gpu."""
    told, names = io.StringIO(), re.findall(r"^  ([a-z-]+)  ", cli.USAGE, re.M)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(told):
        patch.setenv("COLUMNS", "300")
        for name in names:
            with suppress(SystemExit):
                cli.main([name, "--help"])
        for arguments in ([], ["--compile-report"]):
            with suppress(SystemExit):
                suite.main([*arguments, "--help"])
        with suppress(SystemExit):
            gpu_proof.main(["--help"])
    return set(re.findall(r"--[a-z0-9][a-z0-9-]*", told.getvalue()))


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page, flags):
    """Every flag named in the running text exists; another test parses the commands in blocks."""
    text = re.sub(r"^ *```.*?^ *```$", "", PAGES[page], flags=re.M | re.S)
    told = set(
        re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9-]*", " ".join(re.findall(r"`[^`\n]+`", text)))
    )
    assert told <= flags | OTHERS_FLAGS


# Links, paths, the site


def test_the_site_builds(tmp_path):
    """A strict build: links, anchors and pictures lead somewhere."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    ran = subprocess.run(
        [*build, "--site-dir", tmp_path / "site"], capture_output=True, text=True, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr
    names = {path.stem for path in (tmp_path / "site").glob("*.html")} - {"404"}
    assert names == {path.stem for path in ROOT.glob("docs/*.md")}
    shown = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "site").glob("*.html"))
    pictures = set(re.findall(r'src="(results/[^"#]+)', shown))
    assert pictures and all((tmp_path / "site" / name).exists() for name in pictures)


def anchors(page):
    """Return the anchors that GitHub and mkdocs make from a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_links_of_the_readme():
    links = re.findall(r"\]\(((?!http)[^)]+)\)", PAGES["README.md"])
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        assert not anchor or anchor in anchors(ROOT / path), link


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    """Every path of the repository that a page names as code."""
    folders = "em_kernels|csrc|benchmarks|docs|tests|examples"
    named = re.findall(rf"`((?:{folders})/[\w./-]*)`", PAGES[page])
    assert [path for path in named if not (ROOT / path).exists()] == []


# What is generated


def test_benchmarks_are_what_the_results_say():
    """The README's part is tested in test_bench."""
    for path, text in report.generated().items():
        begun = path.read_text(encoding="utf-8").split(report.BEGIN)[1].split(report.END)[0]
        assert begun.strip() == text


def test_integrating_has_the_trainers_peaks():
    trainer = json.loads((ROOT / "benchmarks/results/hf_trainer.json").read_text())["trainer"]
    text = " ".join(PAGES["integrating.md"].split())
    ours, theirs = (trainer[name]["peak_gib"] for name in ("EntropyTrainer", "logits"))
    assert f"peaks at {ours:.1f} GiB, the same Trainer with logits at {theirs:.1f} GiB" in text


def test_the_readme_s_first_numbers():
    (stem,) = re.findall(r'src="benchmarks/results/(.*)-time-light.svg"', PAGES["README.md"])
    results = ROOT / f"benchmarks/results/{stem}.json"
    cases = json.loads(results.read_text())["cases"].values()
    chosen = {"shape": "qwen2.5-1.5b", "dtype": "bfloat16", "task": "loss", "input": "lm-0.5"}
    rows = {c["provider"]: c for c in cases if chosen.items() <= c.items()}
    ours, compiled = rows["ours"], rows["compile"]
    worse = max(compiled["error"].values()) / max(ours["error"].values())
    # In a fresh process, as a reader's is, where that was measured
    ms = {
        name: rows[name].get("fresh_time_ms", rows[name]["time_ms"])
        for name in ("ours", "compile", "floor")
    }
    text = " ".join(PAGES["README.md"].split())
    assert f"({ours['tokens']} tokens, {ours['vocab_size']:,} vocabulary entries, bf16)" in text
    assert f"all gradients take {ms['ours']:.0f} ms" in text
    assert f"takes {ms['compile']:.0f} ms with {worse:.0f} times the error" in text
    assert f"the matrix products alone take {ms['floor']:.0f} ms" in text


def test_equations_are_numbered_as_in_the_reference():
    numbers = re.findall(r"^ +\((\d)\)", reference.__doc__, re.M)
    assert re.findall(r"\\tag\{(\d)\}", PAGES["mathematics.md"]) == numbers


def alike(told, found):
    """Return True if texts agree, numbers within rounding: library versions keep other tensors."""
    number = r"\d+(?:\.\d+)?"
    assert re.split(number, told) == re.split(number, found)
    pairs = zip(re.findall(number, told), re.findall(number, found), strict=True)
    return all(float(a) == pytest.approx(float(b), rel=0.02, abs=0.051) for a, b in pairs)


def words_of(text):
    return " ".join(re.sub(r"[^\w\s.,:;+*$'-]|-{3,}", " ", text).split())


@pytest.mark.slow
def test_plans_of_7b():
    """The plans for a 24 GB card; python docs/plans.py regenerates the page."""
    page = PAGES["memory.md"]
    machines = [name for name in plans.MACHINES if name.startswith("24 GB")]
    with plans.folders():
        command, rows = plans.command(plans.MODEL + "7B"), plans.table(plans.MODEL + "7B", machines)
    (told,) = (
        f"```console\n{b.text}```" for b in BLOCKS if b.page == "memory.md" and b.kind == "console"
    )
    assert alike(words_of(told), words_of(command))
    told = page.split("7B:\n\n")[1].splitlines()
    for row in rows[2:]:
        (line,) = (
            line
            for line in told[: 2 + len(plans.MACHINES)]
            if line.split(" | ")[0] == row.split(" | ")[0]
        )
        assert alike(words_of(line), words_of(row))


@pytest.mark.slow
def test_plans_are_what_the_page_says():
    begun = PAGES["memory.md"].split("<!-- docs/plans.py: begin -->")[1].split("<!-- end -->")[0]
    with plans.folders():
        assert alike(words_of(begun), words_of(plans.text()))
