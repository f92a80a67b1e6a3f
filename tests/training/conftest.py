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
