import pytest
import torch
from training.tiny import make_model, make_tokenizer, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from em_kernels.training.demo_model import fetch_demo

disable_progress_bar()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def exact_model():
    """fp64: rounding cannot flip a token."""
    return make_model(dtype=torch.float64)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def demo():
    """The 135M model and its tokenizer; a skip would hide a broken conversion."""
    folder = fetch_demo()
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Of llama with tied weights (True) and untied ones (False), and of falcon."""
    home = tmp_path_factory.mktemp("models")
    found = {tied: save_tiny(home / str(tied), tied=tied) for tied in (True, False)}
    return {**found, "falcon": save_tiny(home / "falcon", "falcon")}
