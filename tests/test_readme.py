"""What the README shows works: its links lead somewhere, its commands are known words, its kernels' example runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTModel

from optimize.kernels import functions
from optimize.tools import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize(
    "line", [ln for block in blocks("") for ln in block.splitlines() if ln.startswith("optimize ")]
)
def test_commands_are_known_words(line: str) -> None:
    cli.parser().parse_args(shlex.split(line.partition("#")[0])[1:])


def test_every_verb_is_among_them() -> None:
    verbs = {line.split()[1] for block in blocks("") for line in block.splitlines() if line.startswith("optimize ")}
    assert verbs >= {"export", "verify", "inspect", "quantize", "evaluate", "record", "profile"}


def test_the_kernels_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [block for block in blocks("python") if "kernels.attention" in block]
    q = torch.randn(1, 8, 77, 40)
    k = v = torch.randn(1, 4, 99, 40)
    x, residual, gate = torch.randn(3, 2, 7, 72)
    model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)).eval()
    scope = dict(
        q=q, k=k, v=v, x=x, residual=residual, gate=gate[:, 0], scale=gate[:, 1], shift=gate[:, 2], model=model
    )
    with torch.no_grad():
        exec(compile(code, "README.md", "exec"), scope)
    assert scope["out"].shape == q.shape
    torch.testing.assert_close(scope["total"], residual + gate[:, :1] * x)
    assert "layers.0.attention" in capsys.readouterr().out


def test_the_table_names_every_operator_of_ours() -> None:
    named = set(re.findall(r"`(\w+)`", README.partition("## Kernels")[2].partition("## What")[0]))
    families = {name for name in functions.texts() if not re.search("^(Gated)?Add|^Packed|Modulated$", name)}
    assert families <= named
