"""A report's numbers against plain torch, its HTML, and what it says if something is missing."""

import json
import re
import shutil
import sys
from collections import Counter
from decimal import Decimal
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from peft import PeftModel
from rich.console import Console
from scipy.stats import skew
from torch.testing import assert_close
from training.tiny import PLAIN, make_model, make_tokenizer, read, run, save_tiny, settings
from transformers import AutoModelForCausalLM

from em_kernels.cli import main
from em_kernels.training.report import page as report_module
from em_kernels.training.report.logit_shift import BINS, HIGH, LOW, measure
from em_kernels.training.report.page import (
    LEVELS,
    pieces,
    read_run,
    write_report,
)
from em_kernels.training.rollouts.sampling import Rollout

VOID = {"meta", "br", "hr", "img", "link"}
PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]


class Page(HTMLParser):
    """A parser that checks that every element is closed, and keeps what the tests look at."""

    def __init__(self, text):
        super().__init__()
        self.text, self.open, self.words = text, [], []
        self.attributes, self.tags, self.tokens = [], Counter(), []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "b":
            self.tokens.append([dict(attributes), ""])

    def handle_startendtag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        if self.open[-1:] == ["b"]:
            self.tokens[-1][1] += data

    @property
    def told(self):
        return " ".join(" ".join(self.words).split())


def report(*folders, output=None, models=True):
    output = output or folders[0] / "report.html"
    write_report(folders, output, Console(file=StringIO()), models)
    return Page(output.read_text(encoding="utf-8"))


def tells(text, expected):
    """Return whether the text contains what is expected, its numbers to one unit in the last digit.

    The last bit of a product decides how a number halfway between two is rounded.
    """
    number = r"\d+(?:\.\d+)?(?:e[+-]\d+)?"
    pattern = "".join(
        f"({number})" if re.fullmatch(number, part) else re.escape(part)
        for part in re.split(f"({number})", expected)
    )
    wanted = [Decimal(x) for x in re.findall(number, expected)]
    for match in re.finditer(pattern, text):
        pairs = list(zip(map(Decimal, match.groups()), wanted, strict=True))
        last = [Decimal(10) ** min(x.as_tuple().exponent for x in pair) for pair in pairs]
        if all(abs(x - y) <= unit for (x, y), unit in zip(pairs, last, strict=True)):
            return True
    return False


def plain(model, rollouts, temperature):
    """Return raw logits (n, V) in fp64, entropies and probabilities of all response tokens."""
    rows = []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad():
            rows.append(model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1].double())
    z = torch.cat(rows)
    logp = (z / temperature).log_softmax(-1)
    entropy = -(logp.exp() * logp).nan_to_num(0).sum(-1)
    tokens = torch.tensor([token for rollout in rollouts for token in rollout.response_ids])
    return z, entropy, logp.exp().gather(1, tokens[:, None])[:, 0]


@pytest.fixture
def quick_pngs(monkeypatch):
    """Write empty PNGs, which two tests draw; the SVGs of the page are drawn."""
    draw = Figure.savefig

    def savefig(figure, target, **options):
        target.touch() if isinstance(target, Path) else draw(figure, target, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)


NAME = "x" * 245 + ".html"  # too long
without_pngs = pytest.mark.usefixtures("quick_pngs")


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "one"
    run(settings(folder, output, steps=3, lr=3e-3, answer="5", loss_temperature=0.7))
    return output


@pytest.mark.parametrize(
    "kind, tolerance",
    [("llama", 1e-8), ("phi", 1e-8), ("gemma2", 1e-5)],  # gemma2's norms are fp32 in any dtype
)
def test_measures_are_plain_torch(kind, tolerance):
    """A tied head, a softcap, a bias that masks an entry; rollouts of two prompts, interleaved."""
    own = {"gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0}, "phi": {"tied": False}}
    model = make_model(kind, dtype=torch.float64, **own.get(kind, {}))
    if kind == "phi":
        model.lm_head.bias.data.normal_()[17] = -torch.inf
    torch.manual_seed(1)
    rollouts = [
        Rollout(PROMPTS[i % 2], torch.randint(20, 260, (n,)).tolist(), True)
        for i, n in enumerate((5, 1, 9, 12, 1, 7))
    ]
    z, entropy, probability = plain(model, rollouts, 0.7)
    tops = torch.randint(20, 260, (len(z),))
    found = measure(model, rollouts, 0.7, Console(file=StringIO()), tops)
    assert_close(found.entropy, entropy, rtol=tolerance, atol=tolerance)
    assert_close(found.probability, probability, rtol=tolerance, atol=tolerance)
    assert torch.equal(found.top, z.argmax(-1))
    assert torch.equal(found.rank, 1 + (z > z.gather(1, tops[:, None])).sum(-1))
    finite = z[z > -torch.inf]
    assert finite.numel() == z.numel() - len(z) * (kind == "phi")
    moments = torch.tensor([found.mean, found.std, found.skewness], dtype=torch.float64)
    expected = [finite.mean(), finite.std(correction=0), skew(finite.numpy())]
    expected = torch.tensor(expected, dtype=torch.float64)
    assert_close(moments, expected, rtol=tolerance, atol=tolerance)
    histogram = torch.histc(finite.float(), BINS, LOW, HIGH).double()
    assert torch.equal(found.histogram, histogram) and histogram.sum() == finite.numel()


@without_pngs
def test_a_page_shows_what_plain_torch_has(trained, folder):
    page, metrics = report(trained), read(trained / "metrics.jsonl")
    models = {
        1: AutoModelForCausalLM.from_pretrained(folder),
        3: AutoModelForCausalLM.from_pretrained(
            trained / "checkpoints" / "step-00003", dtype=torch.float32
        ),
    }
    rollouts = {update: read_run(trained).rollouts[update] for update in models}
    tokenizer, tokens = make_tokenizer(), iter(page.tokens)
    for update, model in models.items():
        z, entropy, probability = plain(model, rollouts[update], 0.7)
        if update == 1:
            assert metrics[0]["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
        at = 0
        for rollout in rollouts[update][:3]:
            names = tokenizer.convert_ids_to_tokens(rollout.response_ids)
            for name in names:
                attributes, _ = next(tokens)
                told = f"{entropy[at]:.3f} nats, probability {probability[at]:.3g}"
                shown, _, of_entropy = attributes["data-t"].rpartition("   ")
                assert shown == name and tells(of_entropy, told)
                assert attributes["class"].split()[0] == f"h{sum(entropy[at] >= x for x in LEVELS)}"
                at += 1
    assert next(tokens, None) is None
    first = [plain(models[update], rollouts[1], 1)[0] for update in models]
    own = plain(models[3], rollouts[3], 1)[0]
    for z in (*first, own):
        told = " ".join(f"{x:.4f}" for x in (z.mean(), z.std(correction=0), skew(z.flatten())))
        assert tells(page.told, f" {len(z)} {told} ")
    changed = (first[0].argmax(-1) != first[1].argmax(-1)).double().mean()
    assert changed > 0 and tells(page.told, f"token changed at {100 * changed:.1f} %")
    ranks = (first[1] > first[1].gather(1, first[0].argmax(-1, keepdim=True))).sum(-1) + 1
    assert f" 1 {100 * (ranks == 1).double().mean():.2f} %" in page.told
    assert f" 3 to 5 {100 * ((ranks >= 3) & (ranks <= 5)).double().mean():.2f} %" in page.told
    last = metrics[-1]["entropy"]
    assert f"entropy went from {metrics[0]['entropy']:.3g} to {last:.3g} nats" in page.told


def test_a_page_needs_nothing_else(trained, tmp_path):
    page = report(trained, output=tmp_path / "new" / "page.html")
    assert not re.search(r"https?:|@import|<script|javascript:", page.text)
    links = [value for name, value in page.attributes if name.split(":")[-1] in ("href", "src")]
    assert links and all(value.startswith("#") for value in links)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids) and {value[1:] for value in links} <= set(ids)
    assert len(page.text) < 500_000 and "\ufffe" not in page.text
    titles = [value for name, value in page.attributes if name == "aria-label"]
    assert page.tags["svg"] == 11 and any(t.startswith("Entropy: one ") for t in titles)
    pngs = sorted((tmp_path / "new" / "page-plots").iterdir())
    assert len(pngs) == 11 and all(png.read_bytes().startswith(b"\x89PNG") for png in pngs)
    assert report(trained).text == page.text  # the same run gives the same page


def test_hostile_names_prompts_and_completions(folder, tmp_path):
    """Names, prompts and output may hold HTML; one character may span several tokens."""
    tokenizer = make_tokenizer()
    texts = ["<script>alert('x')</script> &amp; \"é\" 漢字🙂\n\x1b[0m\u202e", "abc the\n\n</b>"]
    prompt = "</pre><img src=x onerror=alert(1)>"
    letter = (
        "漢" if sys.getfilesystemencoding() == "utf-8" else "a"
    )  # A file name cannot have it otherwise.
    name, ids = f'a <b> $x_$ & "q" {letter}', tokenizer(prompt).input_ids
    rows = [{"prompt_ids": ids, "response_ids": tokenizer(t).input_ids + [0]} for t in texts]
    (source := tmp_path / "source").mkdir()
    lines = [{"update": 1, "index": i, **row, "ended": True} for i, row in enumerate(rows)]
    (source / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {"prompt": prompt, "chat_template": False, "steps": 1, "rollouts": 2}
    changes["sampling"] = PLAIN.model_copy(update={"max_new_tokens": 64})
    run(settings(folder, tmp_path / name, rollouts_from=source, **changes))
    page = report(tmp_path / name, output=tmp_path / "page.html")
    assert not {"script", "img"} & page.tags.keys() and page.tags["b"] == len(page.tokens)
    assert prompt in page.words and name in page.words and "was sampled" in page.told
    shown = [text for _, text in page.tokens]
    half = len(shown) // 2  # The same completions are shown for both models.
    assert shown[:half] == shown[half:]
    expected = f"{texts[0]}<|end|>{texts[1]}<|end|>".replace("\n", "↵\n").replace("\x1b", "␛")
    assert "".join(shown[:half]).replace("·", "") == expected
    page = report(tmp_path / name, output=tmp_path / "page.html", models=False)
    assert not page.tokens and not {"script", "img"} & page.tags.keys()
    assert any("<script>alert('x')</script>" in word for word in page.words)


def test_pieces_of_characters():
    tokenizer = make_tokenizer()
    ids = tokenizer("aé🙂 the").input_ids
    assert pieces(tokenizer, [5], ids) == ["a", "", "é", "", "", "", "🙂", " ", "the"]
    (start,) = tokenizer("🙂").input_ids[:1]
    assert pieces(tokenizer, [], [start, 0, start]) == ["", "�<|end|>", ""]
    assert pieces(tokenizer, [], [start] * 9) == [""] * 9


@without_pngs
def test_adapters_and_one_update(folder, tmp_path):
    """LoRA checkpoints are loaded on their base; with one update there are no later texts."""
    config = settings(folder, tmp_path / "lora", mode="lora", steps=1, lr=0.1)
    run(config)
    page = report(tmp_path / "lora")
    (rollouts,) = read_run(tmp_path / "lora").rollouts.values()
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapted = PeftModel.from_pretrained(base, tmp_path / "lora" / "checkpoints" / "step-00001")
    z = plain(adapted, rollouts, 1)[0]
    told = " ".join(f"{x:.4f}" for x in (z.mean(), z.std(correction=0), skew(z.flatten())))
    assert tells(page.told, f"update 1, 6 of 6 trained {len(z)} {told} ")
    assert page.tags["svg"] == 9 and "nothing was sampled after it" in page.told
    assert "sampled by the model before that update" not in page.told


@without_pngs
def test_an_answer_that_came_on_resume(folder, tmp_path):
    config = settings(folder, tmp_path / "run", steps=1, save_optimizer=True)
    run(config)
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "2", "--answer", "5"]) == 0
    accuracy = [row["accuracy"] for row in read(tmp_path / "run" / "metrics.jsonl")]
    page = report(tmp_path / "run", models=False)
    assert accuracy[0] is None and f"prompt was {accuracy[1]:.0%} in update 2." in page.told


@without_pngs
@pytest.mark.slow
def test_long_completions_and_several_runs(folder, tmp_path, monkeypatch):
    longest = 24
    monkeypatch.setattr(report_module, "LONGEST", longest)
    sampling = PLAIN.model_copy(update={"max_new_tokens": longest + 4})
    changes = {"sampling": sampling, "steps": 1, "rollouts": 2}
    for seed in (1, 2):
        run(settings(folder, tmp_path / str(seed) / "run", seed=seed, **changes))
    page = report(tmp_path / "1" / "run", tmp_path / "2" / "run", output=tmp_path / "both.html")
    assert str(tmp_path / "1" / "run") in page.words  # The folders' names are equal.
    rollouts = [read_run(tmp_path / s / "run").rollouts[1] for s in "12"]
    assert page.told.count("more tokens") == 2 * sum(
        len(r.response_ids) > longest for group in rollouts for r in group
    )
    assert page.tags["svg"] == 10


@without_pngs
@pytest.mark.parametrize("what", ["no checkpoint", "no model", "other model", "no metrics"])
def test_what_is_missing_is_said(what, trained, folder, tmp_path):
    shutil.copytree(trained, copy := tmp_path / "run")
    config = (copy / "config.yaml").read_text("utf-8")
    if what == "no checkpoint":
        shutil.rmtree(copy / "checkpoints")
        said = "Not here: the run has no checkpoint yet."
    elif what == "no model":
        (copy / "config.yaml").write_text(config.replace(str(folder), str(tmp_path / "gone")))
        said = f"Not here: model: there is no folder {tmp_path / 'gone'}."
    elif what == "other model":
        model = save_tiny(tmp_path / "small", vocab_size=20)
        (copy / "config.yaml").write_text(config.replace(str(folder), str(model)))
        said = f"Not here: model: {model} is not the run's: it lacks tokens that were sampled."
    else:
        for path in ("metrics.jsonl", "rollouts.jsonl", "checkpoints", "report.html"):
            shutil.move(copy / path, tmp_path / path) if (copy / path).exists() else None
        said = "No update has finished yet."
    page = report(copy)
    assert said in page.told and not page.tokens
    assert page.tags["svg"] == (0 if what == "no metrics" else 9)
    assert ("Without colours" in page.told) == (what != "no metrics")


@without_pngs
def test_the_command(trained, tmp_path, capfd):
    output = tmp_path / "page.html"
    assert main(["report", str(trained), "--no-models", "--output", str(output)]) == 0
    assert capfd.readouterr().out.strip() == str(output)
    assert "left out, as --no-models asks" in output.read_text("utf-8")
    assert main(["report", str(trained), "--no-models"]) == 0
    assert capfd.readouterr().out.strip() == str(trained / "report.html")
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    assert "Examples: em-kernels report runs/seed15" in " ".join(capfd.readouterr().out.split())


@without_pngs
@pytest.mark.parametrize("what", ["no run", "folder", "here", "in the way", "long", "damaged"])
def test_what_is_refused(what, trained, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    runs, output = tmp_path / "run", tmp_path / "page.html"
    shutil.copytree(trained, runs)
    if what == "no run":
        runs, line = tmp_path, f"RUN: {tmp_path} is not the folder of a run: .* name the --output"
    elif what == "folder":
        output, line = tmp_path, f"output: {tmp_path} is a folder; name a file"
    elif what == "here":
        output, line = ".", r"output: \. is a folder; name a file, report.html say"
    elif what in ("long", "in the way"):  # The plots, which are drawn first, have shorter names.
        output = runs / "config.yaml" / "page.html" if what == "in the way" else tmp_path / NAME
        line = f"output: cannot write {output}: "
    else:
        (runs / "metrics.jsonl").write_text("{\n")
        line = f"output: line 1 of {runs / 'metrics.jsonl'} is damaged"
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", str(runs), "--no-models", "--output", str(output)]) == 2
    stdout, stderr = capfd.readouterr()
    assert stdout == "" and stderr.count("\n") == 1
    assert re.match(f"em-kernels report: error: {line}", stderr)
    assert sorted(tmp_path.rglob("*")) == before
